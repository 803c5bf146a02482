"""What a run holds, made harmless: its texts are data, and none of them becomes markup or code.

Anyone may commit a run. The notebooks of nbs/ are the site's own: building the site executes their
code, so whoever can change them needs no hole in a page.
"""

import base64
import html
import re
import nh3
from markdown_it import MarkdownIt
from mathml import mathml
from mdit_py_plugins.dollarmath import dollarmath_plugin

SIZES = {'short', 'tiny', 'long'}
MATH = set(
    'math menclose mfrac mi mn mo mover mpadded mphantom mroot mrow mspace msqrt mstyle msub '
    'msubsup msup mtable mtd mtext mtr munder munderover'.split()
)
MATH_ATTRIBUTES = set(
    'accent display displaystyle fence form linethickness lspace mathvariant maxsize minsize '
    'movablelimits rspace scriptlevel separator stretchy symmetric width height depth'.split()
)
TAGS = nh3.ALLOWED_TAGS - {'map', 'area', 'nav', 'header', 'footer'}
PICTURE = re.compile(r'data:image/(png|jpeg|gif|webp|svg\+xml);base64,[A-Za-z0-9+/=\s]*')
LINK = re.compile(r'https?:|mailto:|#|[^:]*$')  # to a page, or within the site


# texts in Markdown


def in_words(text) -> str:
    "Write a text as Markdown that means no more than its letters, in a line or a table's cell."
    return re.sub(r'([!-/:-@\[-`{-~])', r'\\\1', ' '.join(str(text).split()))


def in_code(text) -> str:
    "Write a text as code in a line of Markdown."
    text = ' '.join(str(text).split())
    ticks = '`' * (1 + max(map(len, re.findall('`+', text)), default=0))
    room = ' ' if text.startswith('`') or text.endswith('`') else ''
    return f'{ticks}{room}{text}{room}{ticks}' if text else ''


def in_cell(text) -> str:
    "Write a text as code in a table's cell, which a bar would end."
    return in_code(text).replace('|', r'\|')


def fenced(kind: str, text: str) -> str:
    "Put a text between fences that it cannot close."
    fence = '`' * (1 + max([2, *map(len, re.findall('`+', text))]))
    return f'{fence}{kind}\n{text}\n{fence}'


# markup


def kept(tag: str, name: str, value: str) -> str | None:
    "Say what stays of an attribute: pictures lie in the page, and links execute nothing."
    if (tag, name) == ('img', 'src'):
        return value if PICTURE.fullmatch(value) else None
    if name in ('href', 'cite'):
        return value if LINK.match(value.strip()) else None
    return value


def sanitised(markup: str, more: set = frozenset()) -> str:
    "Strip HTML of what could execute, ask another machine, or look like a part of the site."
    attributes = nh3.ALLOWED_ATTRIBUTES | {tag: MATH_ATTRIBUTES for tag in more}
    attributes['mtd'] = {'style'}
    sizes = SIZES | {f'text-{side}' for side in ('left', 'center', 'right')}
    return nh3.clean(
        markup,
        tags=TAGS | more,
        attributes=attributes,
        attribute_filter=kept,
        filter_style_properties={'text-align'},
        allowed_classes={
            'table': {'dataframe', 'docutils'},
            'div': {'table-wrapper', 'equation'},
            'td': sizes,
            'th': sizes,
            'mo': {'prime'},
            'mi': {'prime'},
        },
        url_schemes={'http', 'https', 'mailto', 'data'},  # the last for pictures only, see `kept`
    )


def size_classes(text: str) -> list[str]:
    """Say of a table cell whether it stays on one line, and whether it needs room.

    Names of runs are as long as sentences, but may break anywhere.
    """
    length = len(text)
    sentence = length > 60 and length < 16 * len(text.split())
    limits = dict(short=length <= 26, tiny=length <= 14, long=sentence)
    return [name for name, holds in limits.items() if holds]


def equation(tex: str, options: dict) -> str:
    "Draw an equation; one that cannot be drawn is shown as it was written."
    block = options['display_mode']
    try:
        drawn = mathml(tex, block)
    except ValueError:
        return f'<code>{html.escape(tex)}</code>'
    return f'<div class="equation">{drawn}</div>' if block else drawn


def reader() -> MarkdownIt:
    "Make a reader of Markdown that takes tags as text and knows no directives and no roles."
    read = MarkdownIt('commonmark', dict(html=False)).enable(['table', 'strikethrough'])
    return read.use(dollarmath_plugin, renderer=equation, double_inline=True)


def sized(tokens):
    "Give tables the classes that the site's style looks for."
    for token, inside in zip(tokens, [*tokens[1:], None]):
        if token.type == 'table_open':
            token.attrSet('class', 'docutils')
        if token.type in ('td_open', 'th_open'):
            side = re.findall(r'text-align:(\w+)', token.attrs.pop('style', ''))
            shown = ''.join(child.content for child in inside.children or [])
            classes = size_classes(shown) + [f'text-{name}' for name in side]
            token.attrSet('class', ' '.join(classes))


def from_markdown(text: str) -> list[tuple[int, str]]:
    """Turn Markdown into what a page is made of: HTML (level 0), and headings with their levels.

    Headings come as words.
    """
    read, env, out, start = reader(), {}, [], 0
    tokens = read.parse(text, env)
    sized(tokens)

    def flush(end):
        made = read.renderer.render(tokens[start:end], read.options, env)
        made = made.replace('<table', '<div class="table-wrapper"><table')
        made = made.replace('</table>', '</table></div>')
        if made.strip():
            out.append((0, sanitised(made, MATH)))

    for i, token in enumerate(tokens):
        if token.type == 'heading_open' and not token.level:
            flush(i)
            words = ''.join(child.content for child in tokens[i + 1].children)
            out.append((int(token.tag[1:]), words))
            start = i + 3
    flush(len(tokens))
    return out


def in_one(made: list[tuple[int, str]]) -> str:
    "Join what `from_markdown` gave: an output has no sections, so its headings are lines."
    lines = (f'<p><b>{html.escape(text)}</b></p>' if level else text for level, text in made)
    return ''.join(lines)


# outputs


def embedded(kind: str, data: str) -> str:
    "Show a picture as a browser shows one that may execute nothing: in the address of an image."
    if kind == 'image/svg+xml':
        data = base64.b64encode(data.encode()).decode()
    address = html.escape(f'data:{kind};base64,{data.strip()}')
    return sanitised(f'<img alt="Output of the cell above" src="{address}">')


def is_png(data: str) -> bool:
    "Say whether a text is a PNG."
    try:
        return base64.b64decode(''.join(data.split()), validate=True).startswith(b'\x89PNG')
    except ValueError:
        return False


def from_latex(text: str) -> str:
    "Draw an output in LaTeX, which IPython may have put between dollars."
    found = re.fullmatch(r'(?s)\s*(\$\$|\$|\\\[|\\\()?(.*?)(?:\$\$|\$|\\\]|\\\))?\s*', text)
    return sanitised(equation(found[2], dict(display_mode=True)), MATH)


def from_output(data: dict) -> dict:
    "Choose what is shown of an output's forms, and make it harmless."
    if 'text/markdown' in data:
        return {'text/html': in_one(from_markdown(data['text/markdown']))}
    if 'text/html' in data:
        return {'text/html': f'<div class="table-wrapper">{sanitised(data["text/html"])}</div>'}
    if is_png(data.get('image/png', '')):
        return {'image/png': data['image/png']}
    for kind in ('image/svg+xml', 'image/jpeg', 'image/gif', 'image/webp'):
        if kind in data:
            return {'text/html': embedded(kind, data[kind])}
    if 'text/latex' in data:
        return {'text/html': from_latex(data['text/latex'])}
    return {'text/plain': data.get('text/plain', '')}
