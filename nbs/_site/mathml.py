"""TeX to MathML when the site is built: latex2mathml's result, corrected where browsers' MathML (Core) or TeX's spacing differ."""

import html, re, unicodedata
from xml.etree import ElementTree as ET
from latex2mathml.converter import convert_to_element

LETTERS = {
    'script': 'SCRIPT',
    'double-struck': 'DOUBLE-STRUCK',
    'bold': 'BOLD',
    'fraktur': 'FRAKTUR',
}
LIMITS = {'min', 'max', 'sup', 'inf', 'lim'}  # take what stands below them, below
FUNCTIONS = {'log', 'ln', 'exp', 'sin', 'cos', 'tan', 'tanh', 'dim', 'det', 'ker', 'gcd', 'deg'}
FENCES = '⟨⟩‖|'
REWRITTEN = (
    (r'\\(begin|end){aligned}', r'\\\1{split}'),
    (r'\\arg(?![a-zA-Z])', r'\\operatorname{arg}'),
)


def mathml(tex: str, block: bool = False) -> str:
    "The equation as MathML. Raises `ValueError` for TeX that it does not understand."
    source = tex.strip()
    if (depth := re.sub(r'\\[{}\\]', '', source)).count('{') != depth.count('}'):
        raise ValueError(f'unbalanced braces in the equation {source!r}')
    for pattern, new in REWRITTEN:
        source = re.sub(pattern, new, source)
    try:
        root = convert_to_element(source, display='block' if block else 'inline')
    except Exception as e:
        raise ValueError(
            f'latex2mathml cannot read the equation {tex.strip()!r}: {type(e).__name__}'
        ) from e
    for e in root.iter():
        e.text = html.unescape(e.text) if e.text else None
    for e in root.iter():
        _letter(e)
        _operator(e)
        _table(e)
    for e in root.iter():
        _arrange(e)
    if unknown := next((e.text for e in root.iter() if e.text and '\\' in e.text), None):
        raise ValueError(
            f'no {unknown} in the equation {tex.strip()!r}: latex2mathml does not know this command'
        )
    return ET.tostring(root, encoding='unicode')


def _arrange(parent):
    "What children mean to each other."
    for before, e, after in zip([None, *parent], parent, [*parent[1:], None]):
        if e.tag in ('msub', 'munder') and len(e) and e[0].tag == 'mo' and e[0].text in LIMITS:
            e.tag = 'munder'
            e[0].set('movablelimits', 'true')
        _beside(before, e, after)


def _beside(before, e, after):
    "What an operator's neighbours say about its space: a sign is no difference, a function stands close to its bracket."
    opened = (
        before is None
        or before.tag == 'mo'
        and before.text in ('(', '[', '{', '⟨', ',', '=', '<', '>', '←', '→', '∝', '/')
    )
    closed = after is not None and after.tag == 'mo' and after.text in (')', ']', '}', '⟩')
    if e.tag == 'mo' and e.text in ('−', '+', '±') and opened:
        e.set('form', 'prefix')
    if e.tag == 'mo' and e.text in ('·', '∗') and before is not None and opened and closed:
        e.set('lspace', '0')
        e.set('rspace', '0')
    if e.tag == 'mi' and e.text in FUNCTIONS:
        e.tag = 'mo'
        e.set('lspace', '0' if opened else '0.17em')
        e.set('rspace', '0' if after is not None and after.text in ('(', '[') else '0.17em')


def _letter(e):
    "Browsers know the letters of an alphabet, not the attribute that asks for it; capital Greek letters stand upright, as in TeX."
    variant = e.attrib.pop('mathvariant', None)
    if variant == 'normal' or e.tag == 'mi' and re.fullmatch('[Α-Ω]', e.text or ''):
        e.set('mathvariant', 'normal')
    elif variant in LETTERS and e.text:
        e.text = ''.join(_styled(c, LETTERS[variant]) for c in e.text)


def _styled(c, style):
    "ℒ for L."
    kind = 'CAPITAL' if c.isupper() else 'SMALL'
    for name in (f'MATHEMATICAL {style} {kind} {c.upper()}', f'{style} {kind} {c.upper()}'):
        try:
            return unicodedata.lookup(name)
        except KeyError:
            pass
    return c


def _operator(e):
    "Operators are operators, named ones have a thin space, fences none."
    text = e.text or ''
    if (
        e.tag == 'mi'
        and text
        and not text.isalnum()
        and text not in ('′', '∞', '∂', '∇', '…', '⋯')
        and unicodedata.category(text[0])[0] in 'SP'
    ):
        e.tag = 'mo'
    if e.tag in ('mi', 'mo') and text == '*':
        e.tag, e.text = 'mo', '∗'
    if e.tag == 'mo' and text and text in '/()[]' + FENCES:
        e.set('lspace', '0')
        e.set('rspace', '0')
    if e.tag == 'mo' and text and text in FENCES:
        e.set('stretchy', 'true' if e.get('minsize') else 'false')
    if e.tag == 'mo' and text.isalpha() and len(text) > 1:
        e.set('lspace', '0.12em')
        e.set('rspace', '0.12em' if text in LIMITS or text == 'arg' else '0')
    if e.tag == 'mover' and len(e) > 1 and e[1].text == '¯':
        e.set('accent', 'true')
        e[1].set('stretchy', 'false')
    if e.tag == 'mtext':
        e.text = text.replace(' ', '\u00a0')
    if e.tag in ('mi', 'mo') and set(text) == {'′'}:
        e.set('class', 'prime')


def _table(e):
    "Columns are aligned by style; MathML Core has no attribute for it."
    if e.tag == 'mtd' and (side := e.attrib.pop('columnalign', None)):
        e.set('style', f'text-align: {side}')
    if e.tag == 'mtable':
        for name in ('columnspacing', 'rowspacing', 'columnalign'):
            e.attrib.pop(name, None)
        e.set('displaystyle', 'true')


def setup(app):
    "The renderer for Sphinx: an equation that cannot be drawn stops the build, with its page."
    from sphinx.errors import ExtensionError

    def drawn(self, node, block):
        try:
            return mathml(node.astext(), block)
        except ValueError as e:
            raise ExtensionError(f'{self.builder.current_docname}: {e}') from e

    def inline(self, node):
        from docutils.nodes import SkipNode

        self.body.append(drawn(self, node, False))
        raise SkipNode

    def block(self, node):
        from docutils.nodes import SkipNode

        self.body.append(f'<div class="equation" tabindex="0">{drawn(self, node, True)}</div>\n')
        raise SkipNode

    app.add_html_math_renderer('mathml', (inline, None), (block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
