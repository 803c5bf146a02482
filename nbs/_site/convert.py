"""What nbdev's processing leaves (a notebook in Quarto's flavour), as a notebook for MyST-NB."""

import base64
import copy
import html
import json
import re
from pathlib import Path
from figures import alt_text, is_plot
from pages import LenientLinks, Page
from prose import front_matter, headings, markdown, relinked, said, without_comments
from safety import fenced, from_markdown, from_output, in_words

DRAWN = re.compile(r'\bplt\.(?:subplots|figure)\(')  # by hand: the code tells nothing of a method
PROGRESS = re.compile(r'\d+%\|.*\|')  # a progress bar, however far it came
# a listing that says its language, as HTML
LISTING = re.compile(
    r'\s*<pre[^>]*>\s*<code class="language-(?P<language>\w+)">(?P<code>.*?)</code>\s*</pre>\s*',
    re.S,
)


# outputs


def joined(value):
    return ''.join(value) if isinstance(value, list) else value


def terminal(text: str) -> str:
    """Show what a terminal shows in the end.

    A carriage return starts the line again; progress bars and the kernel's remarks are not kept.
    """
    lines = [line.rstrip('\r').split('\r')[-1] for line in text.split('\n')]
    lines = [re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', line) for line in lines]
    kept = [n for n in lines if not PROGRESS.search(n) and '[IPKernelApp]' not in n]
    return '\n'.join(kept).strip('\n')


def shown_html(text: str) -> dict:
    "Show an output in HTML: a listing is highlighted as code, all else stands in a box."
    if listing := LISTING.fullmatch(text):
        code = html.unescape(listing['code']).strip('\n')
        return {'text/markdown': fenced(listing['language'], code)}
    text = re.sub(r'<style.*?</style>', '', text, flags=re.S)
    text = text.replace(' border="1"', '').replace(' style="text-align: right;"', '')
    return {'text/html': f'<div class="table-wrapper">{text}</div>'}


def shown_data(data: dict, page: Page, links) -> dict:
    "Choose what the site shows of an output's forms: a text, a table, a picture."
    data = {k: joined(v) for k, v in data.items() if not k.startswith('application/')}
    if page.shows_runs and not isinstance(links, LenientLinks):
        links = LenientLinks(links)  # an experiment shows a run's outputs, which are not our own
    if 'text/markdown' in data:
        data['text/markdown'] = relinked(data['text/markdown'], page, links)
    if page.shows_runs:
        return from_output(data)
    if 'text/markdown' in data:
        return {'text/markdown': data['text/markdown']}
    if 'text/html' in data:
        return shown_html(data['text/html'])
    if 'image/png' in data:
        return {'image/png': data['image/png']}
    return data


def size_of(output) -> dict:
    "Keep the size of a picture, which alone the site reads of what is told about an output."
    told = output.get('metadata', {}).get('image/png', {})
    size = {k: told[k] for k in ('width', 'height') if isinstance(told.get(k), int)}
    return {'image/png': size} if size else {}


def outputs(cell, page: Page, links) -> list[dict]:
    "Convert a cell's outputs: streams joined and settled, links led on, tables in boxes."
    out = []
    for output in copy.deepcopy(cell.get('outputs', [])):
        if 'data' in output:
            output['data'] = shown_data(output['data'], page, links)
            output['metadata'] = size_of(output)
        elif output['output_type'] == 'stream':
            output['text'] = joined(output['text'])
            if out and out[-1].get('name') == output['name']:
                out[-1]['text'] += output['text']
                continue
        out.append(output)
    for output in out:
        if output['output_type'] == 'stream':
            output['text'] = terminal(output['text'])
    return [o for o in out if o['output_type'] != 'stream' or o['text'].strip()]


def width(output) -> int:
    "Measure a PNG, in pixels of the page."
    png = base64.b64decode(output['data']['image/png'][:64])
    told = output.get('metadata', {}).get('image/png', {}).get('width')
    return told or int.from_bytes(png[16:20], 'big')


# cells


def directives(source: str) -> tuple[dict, str]:
    "Split a cell into the `#|` lines at its beginning and the rest."
    found, lines = {}, source.splitlines()
    while lines and (line := re.match(r'\s*#\|\s*([\w-]+)\s*:?\s*(.*)', lines[0])):
        found[line[1]] = line[2].strip(' "\'')
        lines.pop(0)
    return found, '\n'.join(lines).strip('\n')


def text_cell(text: str) -> dict:
    return dict(cell_type='markdown', metadata={}, source=text)


def titled(title: str, lead: str) -> dict:
    "Write the title and the line under it."
    return text_cell(f'# {title}\n\n' + (f'{{.lead}}\n{lead}\n' if lead else ''))


def exported(source: str, folded: bool) -> dict:
    "Show the source of what a documentation block above it describes."
    state = '' if folded else ' open'
    return text_cell(
        f'<details class="exported"{state}><summary>Exported source</summary>\n\n'
        f'{fenced("python", source)}\n\n</details>'
    )


def told_by_run(source: str, page: Page, links) -> list[dict]:
    "Convert the text of a run, a level below the page's own title: no tag and no directive counts."
    out = []
    for level, text in from_markdown(relinked(without_comments(source), page, links)):
        heading = '#' * min(level + 1, 6)
        raw = fenced('{raw} html', text)
        out.append(text_cell(f'{heading} {in_words(text)}' if level else raw))
    return out


def documented(cell, page: Page, links) -> list[dict]:
    "Turn what `show_doc` gave into text."
    forms = [output.get('data', {}) for output in cell['outputs']]
    texts = [joined(form['text/markdown']) for form in forms if 'text/markdown' in form]
    return [text_cell(relinked(text, page, links)) for text in texts]


def folding(found: dict, source: str, page: Page) -> list[str]:
    "Say by MyST-NB's tags whether a cell's code is seen, one click away, or not at all."
    if found.get('echo') == 'false' or not source:
        return ['remove-input']
    marked = found.get('code-fold') == 'true'
    # who reads a report wants its tables; a run may be older than its notebook's marks
    folded = marked or page.section == 'Reports' or page.is_run and DRAWN.search(source)
    return ['hide-input'] if folded else []


def picture(images: list[dict], alt: str) -> dict:
    "Tell MyST-NB how a cell's pictures are shown."
    widest = max(map(width, images))
    out = dict(alt=alt)
    plots = all(is_plot(output['data']['image/png']) for output in images)
    marks = dict(wide=widest > 600, plot=plots)
    if any(marks.values()):
        out['classes'] = ' '.join(name for name, holds in marks.items() if holds)
    if images[0].get('metadata'):
        # drawn for a sharp screen, with more pixels than its width; 16: the padding
        out['width'] = f'{widest + 16}px'
    return dict(image=out)


def code(cell, page: Page, links, before='', heading='') -> dict:
    "Convert a code cell; `before` is the text that leads to it, under `heading`."
    found, source = directives(joined(cell['source']))
    outs = outputs(cell, page, links)
    kept = ('parameters', 'injected-parameters')
    tags = [tag for tag in cell['metadata'].get('tags', []) if tag in kept]
    meta = dict(tags=tags + folding(found, source, page))
    if images := [o for o in outs if 'image/png' in o.get('data', {})]:
        alt = alt_text(source, before, heading, found.get('fig-alt', ''))
        meta['mystnb'] = picture(images, alt)
    return dict(
        cell_type='code',
        id=cell.get('id', ''),
        metadata=meta,
        execution_count=None,
        source=source,
        outputs=outs,
    )


def is_hidden(cell) -> bool:
    "Say whether a reader does not see a cell: nbdev hides those of nbs/ before, a run has its own."
    source = joined(cell['source'])
    empty = not source.strip() and not cell.get('outputs')
    return cell['cell_type'] == 'raw' or 'hide' in directives(source)[0] or empty


def told(source: str, page: Page, links) -> list[dict]:
    "Convert a cell of text."
    if page.is_run:
        return told_by_run(source, page, links)
    text = markdown(source, page, links)
    return [text_cell(text)] if text.strip() else []


def cells(nb, page: Page, links) -> list[dict]:
    "Convert all cells but the title."
    out, before, heading = [], '', ''
    for cell in nb['cells']:
        if is_hidden(cell):
            continue
        source = joined(cell['source'])
        found, rest = directives(source)
        if cell['cell_type'] == 'markdown':
            out += told(source, page, links)
            before, heading = source, headings(source, heading)
        elif rest.startswith('show_doc(') and not page.shows_runs:
            out += documented(cell, page, links)
        elif found.get('code-summary') == 'Exported source':
            out.append(exported(rest, found['code-fold'] == 'true'))
        else:
            out.append(code(cell, page, links, before, heading))
    return out


# notebooks


def bare(cell) -> str:
    "Strip a cell of directives and magics, say for its figures: they compute nothing."
    source = directives(joined(cell['source']))[1]
    return re.sub(r'^%.*\n?', '', source, flags=re.M).strip()


def with_outputs_of(nb, run) -> tuple[dict, int]:
    """Give an experiment the outputs of an executed run, where the code is the same.

    Returns a new notebook, and at how many cells the code is the same.
    """
    nb, same = copy.deepcopy(nb), 0
    executed = {}
    for cell in run['cells']:
        if cell['cell_type'] == 'code':
            executed.setdefault(bare(cell), cell['outputs'])
    for cell in nb['cells']:
        if cell['cell_type'] == 'code':
            source = bare(cell)
            cell['outputs'] = executed.get(source, [])
            same += source in executed
    return nb, same


def notebook(made: list[dict]) -> dict:
    "Make a notebook of these cells, with ids of its own."
    kernel = dict(display_name='Python 3', language='python', name='python3')
    language = dict(name='python', pygments_lexer='python3')
    return dict(
        cells=[cell | dict(id=f'cell-{i}') for i, cell in enumerate(made)],
        metadata=dict(kernelspec=kernel, language_info=language),
        nbformat=4,
        nbformat_minor=5,
    )


def read(path) -> dict:
    return json.loads(Path(path).read_text(encoding='utf-8'))


def lead_of(nb, page: Page, links) -> tuple[str, str, str]:
    "Give the title, the line under it as Markdown, and the same in words."
    raw = (joined(cell['source']) for cell in nb['cells'] if cell['cell_type'] == 'raw')
    matter = next(filter(None, map(front_matter, raw)), {})
    lead = str(matter.get('description', ''))
    return str(matter.get('title', page.name)), markdown(lead, page, links), said(lead)
