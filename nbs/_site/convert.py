"""What nbdev's processing leaves (a notebook in Quarto's flavour), as a notebook for MyST-NB."""

import ast, base64, functools, json, re
from pathlib import Path
import yaml
from pages import ROOT, Page

CALLOUTS = dict(note='note', tip='tip', warning='warning', caution='caution', important='important')
PROGRESS = re.compile(r'\d+%\|.*\|')  # a progress bar, however far it came
FENCE = re.compile(r'^(\s*(?:```|~~~))')


def outside_code(text: str, change) -> str:
    "Markdown with what is no code passed through a function."
    out, prose, fence = [], [], None

    def flush():
        if prose:
            out.append(
                ''.join(
                    p if p.startswith('`') else change(p)
                    for p in re.split(r'(`+[^`]+`+)', ''.join(prose))
                )
            )
            prose.clear()

    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if fence is None and not mark:
            prose.append(line)
            continue
        flush()
        out.append(line)
        if mark:
            fence = None if fence == mark[1].strip() else fence or mark[1].strip()
    flush()
    return ''.join(out)


def relinked(text: str, page: Page, links) -> str:
    "Markdown whose links lead to pages of the site."
    return outside_code(
        text, lambda t: re.sub(r'\]\(([^)\s]+)\)', lambda m: f']({links(m[1], page)})', t)
    )


def front_matter(text: str) -> dict:
    "The YAML between two lines of dashes."
    found = re.match(r'---\n(.*?)\n---', text.strip(), re.S)
    return yaml.safe_load(found[1]) if found else {}


def callouts(text: str) -> str:
    "Quarto's callouts as admonitions."

    def opened(m):
        kind, title = CALLOUTS.get(m[2], 'note'), re.search(r'title="([^"]*)"', m[3])
        return f'{m[1]}{{admonition}} {title[1]}\n:class: {kind}' if title else f'{m[1]}{{{kind}}}'

    return re.sub(r'^(:{3,})\s*\{\.callout-(\w+)([^}]*)\}\s*$', opened, text, flags=re.M)


def markdown(text: str, page: Page, links) -> str:
    "A Markdown cell."
    text = outside_code(text, lambda t: re.sub(r'<!--.*?-->', '', t, flags=re.S))
    return relinked(callouts(text), page, links)


def directives(source: str) -> tuple[dict, str]:
    "The `#|` lines at the beginning of a cell, and the rest."
    found, lines = {}, source.splitlines()
    while lines and (m := re.match(r'\s*#\|\s*([\w-]+)\s*:?\s*(.*)', lines[0])):
        found[m[1]] = m[2].strip(' "\'')
        lines.pop(0)
    return found, '\n'.join(lines).strip('\n')


def terminal(text: str) -> str:
    "What a terminal shows in the end: a carriage return starts the line again. Progress bars and the kernel's remarks are not kept."
    lines = [
        re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', line.rstrip('\r').split('\r')[-1])
        for line in text.split('\n')
    ]
    return '\n'.join(
        line for line in lines if not PROGRESS.search(line) and '[IPKernelApp]' not in line
    ).strip('\n')


def joined(value):
    return ''.join(value) if isinstance(value, list) else value


def outputs(cell, page: Page, links) -> list[dict]:
    "A cell's outputs: streams joined and settled, links led on, tables in a box that scrolls."
    out = []
    for o in cell.get('outputs', []):
        o = json.loads(json.dumps(o))
        if o['output_type'] == 'stream':
            text = joined(o['text'])
            if out and out[-1]['output_type'] == 'stream' and out[-1]['name'] == o['name']:
                out[-1]['text'] += text
            else:
                out.append(o | dict(text=text))
            continue
        data = {
            k: joined(v) for k, v in o.get('data', {}).items() if not k.startswith('application/')
        }
        if 'text/markdown' in data:
            data = {'text/markdown': relinked(data['text/markdown'], page, links)}
        if 'text/html' in data:
            data = {'text/html': html_table(data['text/html'])}
        if 'image/png' in data:
            data = {'image/png': data['image/png']}
        out.append(o | (dict(data=data) if 'data' in o else {}))
    for o in out:
        if o['output_type'] == 'stream':
            o['text'] = terminal(o['text'])
    return [o for o in out if o['output_type'] != 'stream' or o['text'].strip()]


def html_table(html: str) -> str:
    "A DataFrame without its own style, in a box."
    html = (
        re.sub(r'<style.*?</style>', '', html, flags=re.S)
        .replace(' border="1"', '')
        .replace(' style="text-align: right;"', '')
    )
    return f'<div class="table-wrapper">{html}</div>'


def said(text: str) -> str:
    "Markdown as plain words."
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return ' '.join(re.sub(r'[`*\\{}]|^[>#]+\s*', '', text, flags=re.M).split())


@functools.cache
def drawing() -> dict:
    "What the package's functions that draw say they do, by name; methods with the name that cells give such an object."
    out = {}
    for path in (ROOT / 'fewshotmeta').glob('*.py'):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        inside = {
            f: rf'(?:{c.name.lower()}|result)\.'
            if c.name == 'Evaluation'
            else c.name.lower() + r'\.'
            for c in ast.walk(tree)
            if isinstance(c, ast.ClassDef)
            for f in c.body
        }
        for f in (f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)):
            if (doc := ast.get_docstring(f) or '').startswith('Draw '):
                out[inside.get(f, '') + f.name] = said(
                    doc.removeprefix('Draw ').split('. ')[0]
                ).rstrip('.')
    return out


def leading_sentence(before: str) -> str:
    "The sentence that leads to a picture: the last one before it if that ends in a colon, or the first of its paragraph."
    blocks = [
        b
        for b in re.split(r'\n\s*\n', re.sub(r'(?s)```.*?```|\$\$.*?\$\$', '', before))
        if b.strip() and not b.lstrip().startswith(('|', '#', '- '))
    ]
    sentences = re.split(r'(?<=[.:?!])\s+(?=[A-Z*`])', said(blocks[-1])) if blocks else []
    chosen = sentences[-1 if sentences[-1].endswith(':') else 0].rstrip(':') if sentences else ''
    return '' if '$' in chosen else chosen


def alt_text(source: str, before: str, heading: str, directive: str = '') -> str:
    "What a picture shows, in words: what its cell says (`#| fig-alt: …`), or its axes or the function that draws it, and the sentence that leads to it."
    if directive:
        return directive

    def label(axis):
        return next(
            iter(re.findall(rf'{axis}label[=(]\s*[\'"]([^\'"{{}}]+)[\'"]', source)), ''
        ).replace('\\n', ' ')

    axes = ' against '.join(filter(None, (label('y'), label('x'))))
    drawn = next((doc for name, doc in drawing().items() if re.search(rf'\b{name}\(', source)), '')
    words = [
        axes or drawn or f'Figure: {said(heading)}',
        leading_sentence(before) or (f'{said(heading)}' if axes or drawn else ''),
    ]
    text = '. '.join(w.rstrip('.') for w in words if w)
    return text if len(text) <= 300 else text[:300].rpartition(' ')[0] + ' …'


def width(output) -> int:
    "Of a PNG, in pixels of the page."
    png = base64.b64decode(output['data']['image/png'][:64])
    return output.get('metadata', {}).get('image/png', {}).get('width') or int.from_bytes(
        png[16:20], 'big'
    )


def code(cell, page: Page, links, before='', heading='') -> dict:
    "A code cell."
    found, source = directives(joined(cell['source']))
    shown = outputs(cell, page, links)
    images = [o for o in shown if 'image/png' in o.get('data', {})]
    meta = dict(tags=[t for t in cell['metadata'].get('tags', []) if 'parameters' in t])
    if found.get('echo') == 'false' or not source:
        meta['tags'].append('remove-input')
    elif page.section == 'Reports':
        meta['tags'].append('hide-input')  # who reads a report wants its tables
    if images:
        meta['mystnb'] = dict(
            image=dict(alt=alt_text(source, before, heading, found.get('fig-alt', '')))
            | (dict(classes='wide') if max(map(width, images)) > 600 else {})
            | (dict(width=f'{max(map(width, images)) + 16}px') if images[0].get('metadata') else {})
        )  # drawn for a sharp screen, with more pixels than its width; 16: the padding
    return dict(
        cell_type='code',
        id=cell.get('id', ''),
        metadata=meta,
        execution_count=None,
        source=source,
        outputs=shown,
    )


def exported(source: str) -> dict:
    "The source of what a documentation block above it describes."
    return text_cell(
        f'<details class="exported" open><summary>Exported source</summary>\n\n```python\n{source}\n```\n\n</details>'
    )


def text_cell(text: str) -> dict:
    return dict(cell_type='markdown', metadata={}, source=text)


def headings(text: str, last: str) -> str:
    "The last heading of a Markdown cell, or the one before it."
    return (re.findall(r'^#+\s+(.+)$', re.sub(r'(?s)```.*?```', '', text), re.M) or [last])[-1]


def cells(nb, page: Page, links) -> list[dict]:
    "All cells but the title."
    out, before, heading = [], '', ''
    for cell in nb['cells']:
        source = joined(cell['source'])
        found, rest = directives(source)
        if (
            cell['cell_type'] == 'raw'
            or 'hide' in found
            or not source.strip()
            and not cell.get('outputs')
        ):
            continue  # nbdev hides those of nbs/ before; a run has its own
        if cell['cell_type'] == 'markdown':
            if (text := markdown(source, page, links)).strip():
                out.append(text_cell(text))
            before, heading = source, headings(source, heading)
        elif rest.startswith('show_doc('):
            out += [
                text_cell(relinked(joined(d), page, links))
                for o in cell['outputs']
                if (d := o.get('data', {}).get('text/markdown'))
            ]
        elif 'code-fold' in found:
            out.append(exported(rest))
        else:
            out.append(code(cell, page, links, before, heading))
    return out


def titled(title: str, lead: str) -> dict:
    "Title and the line under it."
    return text_cell(f'# {title}\n\n' + (f'{{.lead}}\n{lead}\n' if lead else ''))


def same_code(a, b):
    "Whether two cells compute the same: a notebook's magics, say for its figures, are no part of that."

    def bare(cell):
        return re.sub(r'^%.*\n?', '', directives(joined(cell['source']))[1], flags=re.M).strip()

    return bare(a) == bare(b)


def with_outputs_of(nb, run) -> tuple[dict, int]:
    "An experiment with the outputs of an executed run instead of its own, where the code is the same; and at how many cells it is."
    code_cells, same = [c for c in run['cells'] if c['cell_type'] == 'code'], 0
    for cell in nb['cells']:
        if cell['cell_type'] != 'code':
            continue
        match = next((c for c in code_cells if same_code(c, cell)), None)
        cell['outputs'] = match['outputs'] if match else []
        same += match is not None
    return nb, same


def notebook(cells) -> dict:
    "A notebook of these cells, with ids of its own."
    for i, c in enumerate(cells):
        c['id'] = f'cell-{i}'
    return dict(
        cells=cells,
        metadata=dict(
            kernelspec=dict(display_name='Python 3', language='python', name='python3'),
            language_info=dict(name='python', pygments_lexer='python3'),
        ),
        nbformat=4,
        nbformat_minor=5,
    )


def read(path) -> dict:
    return json.loads(Path(path).read_text(encoding='utf-8'))


def lead_of(nb, page, links) -> tuple[str, str, str]:
    "Title, the line under it as Markdown, and the same in words."
    matter = next(
        (
            m
            for c in nb['cells']
            if c['cell_type'] == 'raw' and (m := front_matter(joined(c['source'])))
        ),
        {},
    )
    lead = str(matter.get('description', ''))
    return str(matter.get('title', page.name)), markdown(lead, page, links), said(lead)
