"""The site: built from clean, then read as its readers do, in a browser; and the pieces of it.

It takes minutes, so it is a target of its own: `make test-site`.
"""

import base64
import colorsys
import contextlib
import functools
import hashlib
import html
import http.server
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
import nbformat
import pytest
from conftest import ROOT

SITE = ROOT / 'nbs' / '_site'
sys.path.insert(0, str(SITE))
pytestmark = pytest.mark.xdist_group('site')  # one build, one browser
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
FLAGS = (
    '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run '
    '--disable-background-networking --disable-component-update --disable-sync'
).split()
NOT_COPIED = shutil.ignore_patterns(
    '.git',
    '.venv',
    '_docs',
    '_proc',
    '__pycache__',
    '.pytest_cache',
    '.ipynb_checkpoints',
    '*_smoke*',
    '*.safetensors',
)


# a copy of the repository, and its site


def make(root):
    "Do what `make docs` does, in this environment."
    return subprocess.run(
        [sys.executable, str(root / 'nbs' / '_site')],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )


def git(root, *args, **options):
    subprocess.run(['git', '-C', str(root), *args], check=True, capture_output=True, **options)


def has_git():
    return (ROOT / '.git').exists() and shutil.which('git')


def commit_what_is_committed(root):
    "Track in a copy what git tracks here: runs that only lie beside the others stay so."
    from pages import run_files

    git(root, 'init', '-q')
    git(root, 'add', '-A', '--', '.', ':!runs')
    runs = [path.as_posix() for path in run_files() if (root / path).exists()]
    git(root, 'add', '-f', '--pathspec-from-file=-', input='\n'.join(runs).encode())


C_SOURCE = '/* twice */\nstatic float twice(const float x) {\n    return 2.0f * x;\n}'


def page_of_listings():
    "A notebook with C in its outputs, as Markdown and as HTML, and a cell whose code is folded."
    escaped = C_SOURCE.replace('<', '&lt;')
    forms = [
        {'text/markdown': f'```c\n{C_SOURCE}\n```'},
        {'text/html': f'<pre><code class="language-c">{escaped}</code></pre>'},
        {'text/plain': "'what it gave'"},
    ]
    sources = ['listing()', 'listing_as_html()', '#| code-fold: true\nfolded()']
    title = dict(cell_type='markdown', id='a', metadata={}, source='# Listings\n\n> Three cells.')
    codes = []
    for i, (source, data) in enumerate(zip(sources, forms)):
        output = dict(output_type='display_data', data=data, metadata={})
        cell = dict(cell_type='code', id=f'b{i}', source=source, outputs=[output])
        codes.append(cell | dict(metadata={}, execution_count=None))
    return dict(cells=[title, *codes], metadata={}, nbformat=4, nbformat_minor=5)


DEAD = 'a link to ../12_gone.ipynb, but there is no nbs/12_gone.ipynb in the repository'


def damaged_run(root):
    "A run with a dead link, a cell that is none, and three fields of another type."
    kept = sorted((root / 'runs').glob('*/maml*/result.json'))[0].parent
    run = root / 'runs' / 'damaged' / 'maml_short_seed0'
    run.mkdir(parents=True)
    nb = json.loads((kept / 'notebook.ipynb').read_text(encoding='utf-8'))
    text = dict(cell_type='markdown', id='d', metadata={}, source='See [there](../12_gone.ipynb).')
    nb['cells'] += [text, dict(cell_type='code', source=7)]
    (run / 'notebook.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    result = json.loads((kept / 'result.json').read_text(encoding='utf-8'))
    result |= dict(seconds='long', versions=[1], metrics=dict(test_accuracy=dict(mean='high')))
    (run / 'result.json').write_text(json.dumps(result), encoding='utf-8')
    return run


@pytest.fixture(scope='session')
def built(tmp_path_factory):
    """A copy of the repository, and its site, built from clean.

    It has a page more, and a run more, which is damaged; what was said of it lies beside.
    """
    root = tmp_path_factory.mktemp('site') / 'fewshotmeta'
    shutil.copytree(ROOT, root, ignore=NOT_COPIED)
    (root / 'nbs' / 'howto' / 'listings.ipynb').write_text(json.dumps(page_of_listings()))
    run = damaged_run(root)
    if has_git():
        commit_what_is_committed(root)
        git(root, 'add', '-f', str(run))
    start = time.time()
    done = make(root)
    (root.parent / 'said').write_text(done.stderr)
    print(f'built from clean in {time.time() - start:.0f} s')
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope='session')
def docs(built):
    return built / '_docs'


def pages_in(docs):
    "All pages, without suffix."
    found = [path for path in docs.rglob('*.html') if '_static' not in path.parts]
    return sorted(path.relative_to(docs).with_suffix('').as_posix() for path in found)


@pytest.fixture(scope='session')
def names(docs):
    return pages_in(docs)


# a browser that looks at it


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        "Stay silent."


@pytest.fixture(scope='session')
def address(docs):
    "The site, served from this machine."
    handler = functools.partial(Quiet, directory=str(docs))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


def chromium(playwright):
    "Find a Chromium: the system's, or the one that Playwright has installed."
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    own = playwright.chromium.executable_path
    return own if os.path.exists(own) else None


@pytest.fixture(scope='session')
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        path = chromium(p)
        if path is None:
            pytest.skip(
                'no Chromium to look at the site with: install one by `apt-get install chromium` '
                'or `.venv/bin/playwright install --with-deps chromium`'
            )
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


# what a reader sees outside code and equations, what the page refers to, and what does not fit
LOOK = r'''() => {
  const prose = [];
  const article = document.querySelector('article');
  const walk = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  const aside = 'pre, code, math, script, style, .sig';
  while (walk.nextNode())
    if (!walk.currentNode.parentElement.closest(aside)) prose.push(walk.currentNode.data);
  const all = (what, f) => [...document.querySelectorAll(what)].map(f);
  return {
    prose: prose.join(' '),
    ids: all('[id]', e => e.id),
    links: all('a[href]', e => e.href),
    images: all('article img', e => [e.src, e.alt, e.naturalWidth]),
    parts: all('link[href]:not([rel=canonical]), script[src]', e => e.href || e.src),
    raw: all('math', e => e.textContent).filter(t => t.includes('\\')).length,
    description: document.querySelector('meta[name=description]')?.content,
    actions: all('.page-actions a', e => [e.textContent, e.href])}}'''
WIDTH = '''() => {
  const boxes = 'html, body, .page, .main, .content, .article-container, article';
  return [...document.querySelectorAll(boxes)]
    .filter(e => e.scrollWidth > Math.max(e.clientWidth, innerWidth) + 1)
    .map(e => `${e.tagName}.${e.className} ${e.scrollWidth}`)}'''

# of each kind of element three are left: a page of code has thousands of words in five colours
THIN = '''() => {
  const seen = {};
  const parts = 'td, th, p, li, dt, dl, code, a, img, details';
  for (const e of document.querySelectorAll(`pre span, article :is(${parts}):not(a *)`)) {
    const above = e.parentElement;
    const kind = [e.tagName, e.className, above?.className, above?.parentElement?.className].join();
    if ((seen[kind] = (seen[kind] || 0) + 1) > 3) e.remove(); }}'''
CHECKS = dict(
    runOnly=['color-contrast', 'image-alt', 'link-name', 'document-title'],
    resultTypes=['violations'],
)
DESK = dict(width=1280, height=900)
WIDE_DESK = dict(width=1440, height=900)
PHONE = dict(width=390, height=844)

# of each block of code: whether it scrolls sideways, its longest line, its lines and those shown
BLOCKS = r'''() => {
  const closed = [...document.querySelectorAll('article details:not([open])')];
  for (const details of closed) details.open = true;
  const out = [];
  for (const pre of document.querySelectorAll('article .highlight pre')) {
    let scrolls = false;
    for (let e = pre; e.tagName !== 'ARTICLE'; e = e.parentElement)
      if (e.matches('pre, .highlight, .highlight *, [class*=highlight-], .output'))
        scrolls ||= e.scrollWidth > e.clientWidth + 1;
    const style = getComputedStyle(pre);
    const around = parseFloat(style.paddingTop) + parseFloat(style.paddingBottom);
    const lines = pre.textContent.replace(/\n$/, '').split('\n');
    out.push({
      scrolls,
      longest: Math.max(...lines.map(line => line.length)),
      lines: lines.length,
      shown: Math.round((pre.clientHeight - around) / parseFloat(style.lineHeight)),
      begins: pre.textContent.slice(0, 60)}); }
  for (const details of closed) details.open = false;
  return out}'''


def violations(page, name):
    "What axe-core says of a page as it is now."
    from axe_playwright_python.sync_playwright import Axe

    part = None if name == 'index' else 'article'
    out = []
    for kind in Axe().run(page, part, options=CHECKS).response['violations']:
        for node in kind['nodes'][:3]:
            why = node['any'][0]['message'][:160] if node['any'] else ''
            out.append((kind['id'], node['target'], why))
    return out


def faults(page, name):
    "What axe-core says of a page in light and in dark."
    page.evaluate(THIN)
    # axe-core would see a colour on its way
    page.add_style_tag(content='* { transition: none !important }')
    out = {}
    for theme in ('light', 'dark'):
        page.emulate_media(color_scheme=theme)
        out[theme] = violations(page, name)
    page.emulate_media(color_scheme='light')
    return out


class Complaints:
    "What a browser says of the pages that it shows, and what it asked for."

    def __init__(self, page):
        self.said = []
        self.asked = []
        page.on('console', self.console)
        page.on('pageerror', lambda error: self.said.append(str(error)))
        page.on('requestfailed', self.failed)
        page.on('request', lambda request: self.asked.append(request.url))
        page.on('response', self.response)

    def console(self, message):
        if message.type in ('error', 'warning'):
            self.said.append(message.text)

    def failed(self, request):
        if request.failure != 'net::ERR_ABORTED':  # the next page came first
            self.said.append(f'failed: {request.url}')

    def response(self, response):
        if response.status >= 400:
            self.said.append(f'{response.status}: {response.url}')


@pytest.fixture(scope='session')
def seen(browser, address, names):
    """Every page as a browser shows it: what it holds, asked for, complained about.

    Runs look alike: two of them stand for all before axe-core, which takes long.
    """
    page = browser.new_page(color_scheme='light', viewport=DESK)
    runs = [name for name in names if name.startswith('runs/') and name != 'runs/index']
    heard, out = Complaints(page), {}
    for name in names:
        heard.said.clear()
        heard.asked.clear()
        page.goto(f'{address}{name}.html')
        looked = page.evaluate(LOOK)
        out[name] = looked | dict(said=heard.said[:], asked=heard.asked[:])
        page.set_viewport_size(PHONE)
        out[name]['wide'] = page.evaluate(WIDTH)
        out[name]['on a phone'] = page.evaluate(BLOCKS)
        page.set_viewport_size(WIDE_DESK)
        out[name]['on a desk'] = page.evaluate(BLOCKS)
        page.set_viewport_size(DESK)
        if name not in runs[2:]:
            out[name]['faults'] = faults(page, name)
    page.close()
    return out


# what it sees


def test_pages_load_without_a_complaint(seen):
    assert len(seen) > 80
    assert {name: page['said'] for name, page in seen.items() if page['said']} == {}


def test_nothing_is_asked_of_another_machine(seen, address):
    foreign = []
    for name, page in seen.items():
        urls = page['asked'] + page['parts']
        foreign += [(name, url) for url in urls if not url.startswith((address, 'data:'))]
    assert foreign == []


def fault_of(link, docs, seen):
    "Where a link within the site leads if nothing is there."
    path, _, fragment = urllib.parse.unquote(link).partition('#')
    path = path.partition('?')[0] or 'index.html'
    if not (docs / path).is_file():
        return path
    if fragment and fragment not in seen[path.removesuffix('.html')]['ids']:
        return f'{path}#{fragment}'


def test_links_lead_somewhere(seen, address, docs):
    broken = []
    for name, page in seen.items():
        links = page['links'] + [source for source, _, _ in page['images']]
        own = [link.removeprefix(address) for link in links if link.startswith(address)]
        found = (fault_of(link, docs, seen) for link in own)
        broken += [(name, fault) for fault in found if fault]
    assert broken == []


def test_own_pages_are_linked_in_place(seen):
    from pages import Links

    site, away = Links().site, []
    for name, page in seen.items():
        away += [(name, link) for link in page['links'] if link.startswith(site)]
    assert not away


def test_pictures_are_there_and_say_what_they_show(seen):
    images = [(name, *image) for name, page in seen.items() for image in page['images']]
    no_words = re.compile(r'[`$\\]|]\(|^_|\.png')
    assert len(images) > 100
    assert [i for i in images if not i[3] or len(i[2]) < 14 or no_words.search(i[2])] == []


def test_no_markup_shows(seen):
    # `**options` is the name of an argument
    raw = re.compile(r'#\||:::|\{\.\w|\$|\\[a-zA-Z]{2,}|\]\(|\*\*(?!\w)|<!--|\{target=')
    found = {name: raw.search(page['prose']) for name, page in seen.items()}
    assert {name: match.group() for name, match in found.items() if match} == {}
    assert [name for name, page in seen.items() if page['raw']] == []


def test_pages_say_what_they_are(seen):
    from pages import Links

    links = Links()
    pages = {name: page for name, page in seen.items() if page['actions']}
    assert {page.name for page in links.pages.values()} <= set(pages)
    for name, page in pages.items():
        actions = dict(page['actions'])
        assert page['description'], name
        assert 'Download notebook' in actions, name
        assert ('Open in Colab' in actions) == bool(links.git), name
        assert ('Edit' in actions) == (bool(links.git) and not name.startswith('runs/')), name


def test_no_page_links_to_a_repository_that_is_not_there(seen):
    from pages import Links, settings

    read = settings()
    home = f'github.com/{read["user"]}/{read["repo"]}'
    away = {}
    for name, page in seen.items():
        links = [*page['links'], *(link for _, link in page['actions'])]
        away[name] = [link for link in links if home in link or 'colab.research' in link]
    assert Links().git or not any(away.values()), {k: v for k, v in away.items() if v}


def test_phone_pages_do_not_scroll_sideways(seen):
    assert {name: page['wide'] for name, page in seen.items() if page['wide']} == {}


LONGEST = 100  # columns of our code


def test_no_code_scrolls_sideways(seen):
    "On a desk our lines stand whole; a longer one, and all on a phone, is broken."
    for where in ('on a desk', 'on a phone'):
        blocks = [(name, block) for name, page in seen.items() for block in page[where]]
        assert len(blocks) > 2000
        assert [(name, block) for name, block in blocks if block['scrolls']] == []
    for name, page in seen.items():
        for block in page['on a desk']:
            whole = block['shown'] == block['lines']
            assert whole or block['longest'] > LONGEST, (name, block)


@pytest.fixture
def clipboard_page(browser, address):
    "A page that may read what it has copied."
    context = browser.new_context(viewport=DESK)
    context.grant_permissions(['clipboard-read', 'clipboard-write'], origin=address)
    yield context.new_page()
    context.close()


@pytest.mark.parametrize('way', ['clipboard', 'selection'])
def test_code_is_copied_by_keyboard(clipboard_page, address, way):
    "By the browser's clipboard, or by a selection where the page may not write to it."
    from playwright.sync_api import expect

    page = clipboard_page
    heard = Complaints(page)
    if way == 'selection':
        page.add_init_script('Clipboard.prototype.writeText = () => Promise.reject()')
    page.goto(f'{address}reports/mamlpp.html')  # which has a policy
    page.evaluate("document.querySelector('article details').open = true")
    focused = 'document.activeElement.className'
    for _ in range(300):
        page.keyboard.press('Tab')
        if page.evaluate(focused) == 'copy':
            break
    button = page.locator('.copy:focus')
    assert button.inner_text() == 'Copy' and button.get_attribute('aria-label') == 'Copy this code'
    assert button.evaluate('e => getComputedStyle(e).opacity') == '1'
    page.keyboard.press('Enter')
    expect(page.get_by_role('status')).to_have_text('Copied')
    expect(button).to_have_text('Copied')
    code = button.evaluate("e => e.parentElement.querySelector('pre').textContent")
    assert page.evaluate('navigator.clipboard.readText()') == code.rstrip('\n') != ''
    expect(button).to_have_text('Copy')
    assert heard.said == []


def test_what_one_runs_can_be_copied_and_what_was_printed_not(browser, address):
    page = browser.new_page()
    page.goto(f'{address}howto/listings.html')
    code = page.locator('.cell_input .copy, .cell_output > [class*=highlight-c] .copy')
    assert code.count() == 5, 'three cells and two listings'
    page.goto(f'{address}howto/cluster.html')
    assert page.locator('.cell_output .output').count() > 3
    assert page.locator('.cell_output .output .copy').count() == 0
    page.close()


READING_ORDER = '''
    # data/banks data/datasets data/episodes data/augment
    learners/maml learners/mamlpp learners/hidra learners/hypermaml
    training/evaluation training/fit engine/layers engine/kernels lab/runs
    experiments/train runs/index reports/mamlpp reports/hypermaml reports/findings
    howto/your_images howto/which_method'''.split()


def test_sidebar_has_the_reading_order(browser, address):
    from pages import SECTIONS

    page = browser.new_page()
    page.goto(address)
    captions = page.evaluate(
        "[...document.querySelectorAll('.sidebar-tree .caption-text')].map(e => e.textContent)"
    )
    links = page.evaluate(
        "[...document.querySelectorAll('.sidebar-tree a')].map(e => e.getAttribute('href'))"
    )
    page.close()
    wings = ['Data', 'Learners', 'Training', 'Engine', 'Lab']
    assert captions == ['Start', *wings, 'Experiments', 'Reports', 'How-to'] == list(SECTIONS)
    links = [link.replace('.html', '') for link in links]
    assert [link for link in links if link in READING_ORDER] == READING_ORDER


def test_search_finds_hidra(browser, address):
    page = browser.new_page()
    page.goto(f'{address}search.html?q=hidra')
    page.wait_for_selector('#search-results ul.search li a', timeout=20_000)
    page.wait_for_function(
        "document.querySelectorAll('#search-results ul.search li').length > 5", timeout=20_000
    )
    found = page.evaluate(
        "[...document.querySelectorAll('#search-results ul.search li a')]"
        ".map(e => e.getAttribute('href'))"
    )
    page.close()
    assert any(link.startswith('learners/hidra.html') for link in found[:8]), found
    assert any(link.startswith('reports/hidra.html') for link in found), found


FIRST_HITS = {
    'install': 'index',
    'GPU': 'engine/plans',
    'save a learner': 'training/saving',
    'load a model': 'training/saving',
    'my own images': 'howto/your_images',
    'resume': 'training/checkpoints',
    'Slurm': 'howto/cluster',
    'citation': 'index',
}


@pytest.mark.parametrize('asked', FIRST_HITS)
def test_search_finds_what_readers_ask(browser, address, asked):
    from playwright.sync_api import expect

    page = browser.new_page()
    page.goto(f'{address}search.html?q={urllib.parse.quote(asked)}')
    first = page.locator('#search-results ul.search li a').first
    first.wait_for(timeout=20_000)
    expect(page.locator('.search-summary')).to_contain_text('found', timeout=20_000)
    found = first.get_attribute('href')
    page.close()
    assert found.startswith(f'{FIRST_HITS[asked]}.html'), found


SWATCHES = {  # of seaborn's, matplotlib's and Okabe's colours, those that our plots draw with
    'C0': '#1f77b4',
    'C1': '#ff7f0e',
    'C2': '#2ca02c',
    'C3': '#d62728',
    'C4': '#9467bd',
    'blue': '#0072b2',
    'vermilion': '#d55e00',
    'green': '#009e73',
    'purple': '#cc79a7',
    'gray': '#7f7f7f',
    'black': '#000000',
}


def picture_of(colours):
    "A PNG, in base64, of a white ground and squares of these colours."
    from PIL import Image

    image = Image.new('RGB', (60 * len(colours) + 60, 120), 'white')
    for i, colour in enumerate(colours):
        image.paste(colour, (60 * i + 60, 30, 60 * i + 100, 90))
    out = io.BytesIO()
    image.save(out, 'PNG')
    return base64.b64encode(out.getvalue()).decode()


def shown_pixels(locator):
    "What a browser shows of an element: (height, width, 3), 0 to 1."
    import numpy as np
    from PIL import Image

    image = Image.open(io.BytesIO(locator.screenshot())).convert('RGB')
    return np.asarray(image) / 255


def luminance(colour):
    "Relative luminance, as the rules on contrast define it."
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('theme', ['auto', 'dark'])
def test_plots_are_dark_on_a_dark_page_and_keep_their_colours(browser, address, theme):
    "A plot's ground is near the page's, what it draws stands out, and hues stay where they were."
    page = browser.new_page(viewport=DESK, color_scheme='dark' if theme == 'auto' else 'light')
    page.goto(f'{address}training/evaluation.html')
    page.evaluate('theme => { document.body.dataset.theme = theme }', theme)
    plot = page.locator('div.cell_output img.plot').first
    source = f'data:image/png;base64,{picture_of(SWATCHES.values())}'
    show = '(e, source) => { e.src = source; e.style.padding = 0; return e.decode() }'
    plot.evaluate(show, source)
    shown = shown_pixels(plot)
    scale = shown.shape[1] / (60 * len(SWATCHES) + 60)
    middle = shown[shown.shape[0] // 2]
    ground = middle[int(20 * scale)]
    assert luminance(ground) < 0.02
    for i, (name, colour) in enumerate(SWATCHES.items()):
        drawn = middle[int((60 * i + 80) * scale)]
        before = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        assert contrast(drawn, ground) >= (7 if name == 'black' else 3), name
        (h0, _, s0), (h1, _, s1) = (colorsys.rgb_to_hls(*c) for c in (before, drawn))
        turned = abs((h0 - h1 + 0.5) % 1 - 0.5) * 360
        assert s0 < 0.05 and s1 < 0.05 or turned < 30, (name, turned)
    page.close()


def test_no_picture_glares_on_a_dark_page(browser, address):
    "Plots are turned round, and what has images in it is toned down."
    page = browser.new_page(viewport=DESK, color_scheme='dark')
    for name, is_plot in (('training/evaluation', True), ('data/glyphs', False)):
        page.goto(f'{address}{name}.html')
        picture = page.locator('div.cell_output img').first
        picture.evaluate('e => { e.loading = "eager"; return e.decode() }')
        assert ('plot' in picture.get_attribute('class')) == is_plot, name
        bright = (shown_pixels(picture).min(-1) > 0.85).mean()
        assert bright < 0.05, (name, bright)
    page.close()


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_contrast(seen, theme):
    "axe-core's checks, on every page but the runs, of which some stand for all."
    checked = {name: page['faults'][theme] for name, page in seen.items() if 'faults' in page}
    assert len(checked) > 40
    assert {name: found for name, found in checked.items() if found} == {}


# what the pages hold


def page_text(docs, name):
    return (docs / f'{name}.html').read_text(encoding='utf-8')


def exported_source(text):
    "The code in a page's blocks of exported source, without markup."
    blocks = re.findall(r'(?s)<details class="exported".*?</details>', text)
    return re.sub(r'<[^>]+>', '', ''.join(blocks))


def public_names():
    "Name and address of every public function and class."
    from fewshotmeta._modidx import d

    for module, names in d['syms'].items():
        for name, (url, _) in names.items():
            short = name.removeprefix(f'{module}.')
            if '.' not in short and not short.startswith('_'):
                yield short, url


def test_every_public_name_is_described_on_its_page(docs):
    "With its source, which needs no network."
    for name, url in public_names():
        page, _, fragment = url.partition('#')
        text = (docs / page).read_text(encoding='utf-8')
        assert f'id="{fragment}"' in text, f'{name} is not on {page}'
        source = exported_source(text)
        assert re.search(rf'\b(def|class) {name}\b', source), f'no source of {name} on {page}'


def digest(png):
    "The name that MyST-NB gives a picture."
    return hashlib.sha256(base64.b64decode(png)).hexdigest()


def own_pictures(path):
    "Digests of the pictures that a notebook keeps."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    outputs = [output for cell in cells for output in cell.get('outputs', [])]
    found = [''.join(output.get('data', {}).get('image/png', '')) for output in outputs]
    return {digest(png) for png in found if png}


def test_experiments_show_a_run_and_no_smoke_test(docs):
    for path in (ROOT / 'nbs' / 'experiments').glob('*.ipynb'):
        text = page_text(docs, f'experiments/{path.stem}')
        assert re.search(r'those of an executed run, <a[^>]*href="\.\./runs/', text), path.stem
        assert 'scale smoke' not in text, path.stem
        own = own_pictures(path)
        assert own, path.stem
        assert not own & set(re.findall(r'_images/(\w+)\.png', text)), path.stem


def test_a_run_comes_with_its_files(docs):
    from pages import run_folders

    pages = sorted((docs / 'runs').glob('*/*.html'))
    assert len(pages) == len(run_folders()) + 1 > 50  # the damaged one
    for page in pages:
        folder = page.with_suffix('')
        scale = json.loads((folder / 'result.json').read_text(encoding='utf-8'))['scale']
        article = page.read_text(encoding='utf-8').partition('<article')[2]
        assert (folder / 'notebook.ipynb').is_file(), page
        assert re.search(rf'\b{scale}\b', article), page


def test_a_damaged_run_costs_its_own_page_alone(built, docs):
    "The build goes on, shows what it can, and says on the page and to who builds what is wrong."
    page = page_text(docs, 'runs/damaged/maml_short_seed0')
    told = re.sub('<[^>]+>', '', page.partition('class="admonition')[2].partition('</div>')[0])
    said = (built.parent / 'said').read_text()
    (warning,) = [line for line in said.splitlines() if line.startswith('warning: ')]
    assert warning.startswith('warning: runs/damaged/maml_short_seed0: ')
    faults = ("seconds='long', no number", 'versions=[1], no object', "={'mean': 'high'}", DEAD)
    for fault in (*faults, 'of notebook.ipynb is malformed'):
        assert fault in warning and fault in told.replace('’', "'").replace('‘', "'")
    assert re.search('See <a href="#"[^>]*>there</a>', page)
    assert 'maml_short_seed0' in page_text(docs, 'runs/index')


def test_c_is_highlighted_and_folded_code_keeps_its_output(docs):
    text = page_text(docs, 'howto/listings')
    listings = re.findall(r'(?s)<div class="highlight-c notranslate">.*?</pre>', text)
    assert len(listings) == 2
    for listing in listings:
        assert '<span class="cm">/* twice */</span>' in listing
        assert '<span class="kt">float</span>' in listing
    before, _, folded = text.partition('<details class="admonition hide')
    code, _, output = folded.partition('</details>')
    assert 'listing_as_html' in before and 'folded' in code and 'what it gave' in output


def test_all_of_the_c_is_shown_and_highlighted(docs):
    text = page_text(docs, 'engine/kernels')
    listings = re.findall(r'(?s)<div class="highlight-c notranslate">.*?</pre>', text)
    assert len(listings) > 10 and all('<span class="k' in listing for listing in listings)
    shown = html.unescape(re.sub(r'<[^>]+>', '', '\n'.join(listings)))
    shown = {line.strip() for line in shown.splitlines()}
    source = (ROOT / 'fewshotmeta' / 'engine' / 'kernels.c').read_text(encoding='ascii')
    _, mark, parts = source.partition('/* == ')
    lines = {line.strip() for line in (mark + parts).splitlines() if '/* == ' not in line}
    assert len(lines) > 500 and lines - shown == set()


def test_the_line_under_a_title_is_whole(docs):
    "As the notebook has it."
    from pages import Links
    from prose import said

    for page in Links().pages.values():
        if page.is_run:
            continue
        cells = json.loads((ROOT / page.source).read_text(encoding='utf-8'))['cells']
        quote = re.search(r'\n> (.*?)(\n\s*\n|$)', ''.join(cells[0]['source']), re.S)[1]
        lead = re.search(r'(?s)<p class="lead">(.*?)</p>', page_text(docs, page.name))[1]
        lead = html.unescape(re.sub(r'<[^>]+>', '', lead))
        letters = [re.sub(r'\W+', '', words) for words in (said(quote), lead)]
        assert letters[0] == letters[1] != '', page.name


def test_no_argument_stands_in_the_row_of_what_is_returned(docs):
    "`**maml` of `mamlpp`, say, which has a comment and stands before the arrow."
    text = page_text(docs, 'learners/mamlpp')
    table = text.partition('id="fewshotmeta.learners.mamlpp.mamlpp"')[2].partition('</table>')[0]
    rows = re.findall('(?s)<tr.*?</tr>', table)
    rows = [re.sub(r'\s+', ' ', html.unescape(re.sub('<[^>]+>', ' ', row))).strip() for row in rows]
    assert [row for row in rows if row.startswith('**maml')] == [
        '**maml MAML ’s other arguments'
    ], rows
    assert not [row for row in rows if row.startswith('returns')]


def test_runs_say_which_inner_step_their_number_is_after(docs):
    "In the list of runs, and on the page of each, which has the others, too."
    listed = page_text(docs, 'runs/index')
    assert listed.count('after inner step') >= listed.count('<table') > 10
    rows = re.findall(r'(?s)<tr.*?</tr>', listed)
    cells = [re.findall(r'(?s)<td.*?</td>', row) for row in rows]
    cells = [[re.sub('<[^>]+>', '', cell).strip() for cell in row] for row in cells if row]
    unknown = [row for row in cells if row[3] and not row[4].isdigit()]
    assert {row[1] for row in unknown} <= {'neurons', 'gaussians'}, unknown
    run = ROOT / 'runs' / 'hidra_t2' / 'hidra_10_rate0.4_long_seed0'
    metrics = json.loads((run / 'result.json').read_text(encoding='utf-8'))['metrics']
    text = re.sub('<[^>]+>', '', page_text(docs, run.relative_to(ROOT).as_posix()))
    assert '10-way, after inner step 3' in text
    for step in range(4):
        found = metrics[f'accuracy_10way_step{step}']
        assert f'{step}: {100 * found["mean"]:.2f} ± {100 * found["ci95"]:.2f}' in text


# what changes it


SEARCH = ('searchindex.js', 'search.html')


def state_of(docs):
    "Digests of the site's files, but of the search's, whose index Sphinx shuffles."
    files = (path for path in docs.rglob('*') if path.is_file() and path.name not in SEARCH)
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run_beside(root):
    "A run of the experiment Train like a user's own, newer than all: `make run` leaves such a one."
    kept = sorted((root / 'runs').glob('*/maml*/result.json'))[0].parent
    mine = root / 'runs' / 'glyphs' / 'first_run_of_mine'
    shutil.copytree(kept, mine)
    result = json.loads((mine / 'result.json').read_text(encoding='utf-8'))
    result |= dict(experiment='glyphs', run=mine.name, finished='2999-01-01T00:00:00')
    (mine / 'result.json').write_text(json.dumps(result), encoding='utf-8')
    return mine


@pytest.mark.skipif(not has_git(), reason='no git says which runs are committed')
def test_a_run_that_is_not_committed_changes_nothing(built, docs):
    before = state_of(docs)
    mine = run_beside(built)
    try:
        done = make(built)
    finally:
        shutil.rmtree(mine)
    assert done.returncode == 0, done.stderr
    after = state_of(docs)
    changed = [path for path in before | after if before.get(path) != after.get(path)]
    assert changed == []
    for name in SEARCH:
        assert mine.name not in (docs / name).read_text(encoding='utf-8')


def source_of(root, name):
    "The notebook behind a page, in a copy of the repository."
    from pages import Links

    found = [page.source for page in Links().pages.values() if page.name == name]
    return root / found[0]


def add_sentence(path, sentence):
    "To the text after a notebook's title."
    nb = json.loads(path.read_text(encoding='utf-8'))
    texts = [cell for cell in nb['cells'] if cell['cell_type'] == 'markdown']
    texts[1]['source'].append(f'\n\n{sentence}')
    path.write_text(json.dumps(nb), encoding='utf-8')


def test_only_what_changed_is_made_again(built, docs):
    "One sentence more: its page is written, and the first, which has the tree; no other is."
    pages = pages_in(docs)
    before = {name: (docs / f'{name}.html').stat().st_mtime_ns for name in pages}
    add_sentence(source_of(built, 'learners/reptile'), 'A sentence that was not there.')
    start = time.time()
    done = make(built)
    print(f'one page again in {time.time() - start:.1f} s')
    assert done.returncode == 0, done.stderr
    assert 'A sentence that was not there.' in page_text(docs, 'learners/reptile')
    changed = {n for n in pages if (docs / f'{n}.html').stat().st_mtime_ns != before[n]}
    assert 'learners/reptile' in changed
    assert changed <= {'learners/reptile', 'index', 'search'}, changed


def wait(what, seconds, say):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, say()
        time.sleep(0.1)


def answer(address, path, host=None):
    "What the server answers to a request as it stands, which no library has mended: the status."
    place = urllib.parse.urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=10) as s:
        head = f'GET {path} HTTP/1.1\r\nHost: {host or place.netloc}\r\nConnection: close\r\n\r\n'
        s.sendall(head.encode('latin1'))
        with s.makefile('rb') as said:
            return int(said.readline().split()[1])


def refused(address, docs):
    "Requests that are not answered as they should be: each with the answer."
    (docs / 'out').symlink_to(ROOT / 'settings.ini')
    (docs / 'inside.html').symlink_to(docs / 'index.html')
    expected = {
        '/index.html': 200,
        '/inside.html': 200,
        '/': 200,
        '/out': 404,
        '/nowhere.html': 404,
        '/%00': 400,
        '/index.html%00': 400,
        '/../settings.ini': 400,
        '/%2e%2e/settings.ini': 400,
        '/..%2fsettings.ini': 400,
        '/%ff%fe': 400,
        '/' + 'x' * 5000: 404,
        '/engine': 404,
    }
    found = {path: answer(address, path) for path in expected}
    wrong = [(path[:40], status) for path, status in found.items() if status != expected[path]]
    for host in ('evil.example', 'evil.example:80', '127.0.0.1.evil.example', 'localhost'):
        if (status := answer(address, '/index.html', host)) != 400:
            wrong.append((host, status))
    port = urllib.parse.urlsplit(address).port
    if (status := answer(address, '/index.html', f'127.0.0.1:{port}')) != 200:
        wrong.append(('127.0.0.1', status))
    for name in ('out', 'inside.html'):
        (docs / name).unlink()
    return wrong


def working_on(built):
    "Processes that still make or show the site."
    found = []
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        with contextlib.suppress(OSError):
            if str(built / 'nbs' / '_site').encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_serving_follows_a_notebook(built):
    "Saved, and the page has it; and it answers what is asked of it by its name alone."
    command = [sys.executable, '-u', str(built / 'nbs' / '_site'), '--serve', '--port', '0']
    log = built / 'serve.log'

    def address():
        found = re.search(r'http://localhost:\d+/', log.read_text())
        return found and found.group()

    def page():
        return urllib.request.urlopen(f'{address()}engine/ranks.html').read().decode()

    with open(log, 'w') as out:
        served = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)
    try:
        wait(address, 120, log.read_text)
        assert '/__reload.js' in page() and 'Saved just now.' not in page()
        assert refused(address(), built / '_docs') == []
        add_sentence(source_of(built, 'engine/ranks'), 'Saved just now.')
        start = time.time()
        wait(lambda: 'Saved just now.' in page(), 60, log.read_text)
        print(f'saved to seen: {time.time() - start:.1f} s')
    finally:
        served.terminate()
        served.wait(20)
    wait(lambda: not working_on(built), 20, log.read_text)
    assert 'Traceback' not in log.read_text()


# what runs hold, which anyone may have committed

HIT = 'hit=7'  # what a payload does where it is executed
PAYLOADS = (
    f'<script>{HIT}</script>',
    f'<img src=x onerror="{HIT}">',
    f'<svg onload="{HIT}"><script>{HIT}</script></svg>',
    f'<a href="javascript:{HIT}">click</a>',
    f'[click](javascript:{HIT})',
    f'[click](<java\tscript:{HIT}>)',
    f'<iframe srcdoc="<script>parent.{HIT}</script>"></iframe>',
    f'<form action="javascript:{HIT}"><button formaction="javascript:{HIT}">click</button></form>',
    '<meta http-equiv="refresh" content="0;url=http://evil.example/">',
    '<base href="http://evil.example/">',
    f'<object data="data:text/html,<script>{HIT}</script>"></object>'
    f'<embed src="javascript:{HIT}">',
    f'<math><maction xlink:href="javascript:{HIT}">click</maction></math>',
    '<math><annotation-xml encoding="text/html">'
    f'<style><img src=x onerror={HIT}></style></annotation-xml></math>',
    '<style>@import "http://evil.example/a.css"; '
    'p {background: url(http://evil.example/b)}</style>',
    '<div style="background: url(http://evil.example/c); position: fixed; inset: 0">over all</div>',
    f'<!--><img src=x onerror="{HIT}">-->',
    f'<noscript><p title="</noscript><img src=x onerror={HIT}>"></noscript>',
    f'<svg></p><style><a id="</style><img src=x onerror={HIT}>">',
    f'<a href="data:text/html,<script>{HIT}</script>">click</a>',
    f'</code></td></script></title></head><script>{HIT}</script>',
    f'"><img src=x onerror={HIT}>',
    f"' onmouseover='{HIT}' onfocus='{HIT}' autofocus tabindex=1 x='",
    f'```{{raw}} html\n<script>{HIT}</script>\n```',
    f'````\n```{{raw}} html\n<script>{HIT}</script>\n```',
    f'{{raw-html}}`<script>{HIT}</script>`',
    f'{{{{ "<script>{HIT}</script>"|safe }}}} {{% raw %}}<script>{HIT}</script>{{% endraw %}}',
    f'<details open ontoggle="{HIT}">text</details>',
    '<img src="http://evil.example/pixel.png">',
    '![x](http://evil.example/pixel.png)',
    f'$\\href{{javascript:{HIT}}}{{click}}$ $$\\text{{<img src=x onerror={HIT}>}}$$',
)
SVG = f'<svg xmlns="http://www.w3.org/2000/svg" onload="{HIT}"><script>{HIT}</script>'


def hostile_notebook(kept):
    "An executed notebook with each payload as text, as code and as every kind of output."
    whole = '\n\n'.join(PAYLOADS)
    kinds = ('text/html', 'text/markdown', 'text/latex', 'text/plain')
    cells = [dict(cell_type='markdown', id='m', metadata={}, source=f'# {PAYLOADS[0]}\n\n{whole}')]
    shown = [{kind: payload, 'text/plain': '.'} for kind in kinds for payload in PAYLOADS]
    shown += [{'image/svg+xml': SVG + payload + '</svg>'} for payload in PAYLOADS]
    shown += [{'image/png': f'" onerror="{HIT}'}, {'application/javascript': HIT}]
    outputs = [
        dict(output_type='display_data', data=data, metadata={'image/png': dict(alt=PAYLOADS[20])})
        for data in shown
    ]
    outputs.append(dict(output_type='stream', name='stdout', text=whole))
    code = dict(cell_type='code', id='c', metadata={}, execution_count=1)
    cells.append(code | dict(source=f'"""{PAYLOADS[19]}"""', outputs=outputs))
    tags = dict(tags=['injected-parameters', PAYLOADS[20]])
    given = dict(id='p', outputs=[], metadata=tags, source=f'data = {whole!r}')
    cells.append(code | given)
    return kept | dict(cells=cells)


def hostile_run(root):
    "A committed run whose every text is an attack; its folder."
    kept = sorted((root / 'runs').glob('*/maml*/result.json'))[0].parent
    run = root / 'runs' / 'hostile' / f'a\'"onclick={HIT}&lt;_short_seed0'
    run.mkdir(parents=True)
    nb = json.loads((kept / 'notebook.ipynb').read_text(encoding='utf-8'))
    (run / 'notebook.ipynb').write_text(json.dumps(hostile_notebook(nb)), encoding='utf-8')
    bad = ''.join(PAYLOADS)
    result = json.loads((kept / 'result.json').read_text(encoding='utf-8'))
    texts = ('experiment', 'scale', 'device', 'commit', 'episodes_digest', 'kernels', 'started')
    result |= {name: bad for name in texts}
    result |= dict(run=bad, notebook=bad, finished=f'"><svg/onload={HIT}>')
    result |= dict(params={'seed': bad, bad: bad}, versions={bad: bad})
    (run / 'result.json').write_text(json.dumps(result), encoding='utf-8')
    return run


@pytest.mark.skipif(not has_git(), reason='no git says which runs are committed')
def test_nothing_that_a_run_holds_is_executed(built, docs, browser, address, record):
    run = hostile_run(built)
    git(built, 'add', '-f', str(run.parent))
    done = make(built)
    assert done.returncode == 0, done.stdout + done.stderr
    # without the page's own policy, which would stop what the sanitiser lets through
    page, asked, dialogs = browser.new_page(bypass_csp=True), [], []
    page.on('request', lambda request: asked.append(request.url))
    page.on('dialog', lambda dialog: dialogs.append(dialog.message))
    found = [n for n in pages_in(docs) if n.startswith('runs/hostile/') or n == 'runs/index']
    assert len(found) == 2
    for name in found:
        page.goto(address + urllib.parse.quote(name) + '.html')
        page.wait_for_timeout(500)
        for clicked in page.get_by_text('click', exact=True).all():
            clicked.dispatch_event('click')
        page.mouse.move(300, 300)
        assert page.evaluate('() => window.hit') is None, name
        assert page.evaluate('() => window.frames.length') == 0
        marks = page.evaluate(MARKS)
        assert marks == [], (name, marks)
        assert urllib.parse.unquote(page.url) == f'{address}{name}.html'
        assert 'hit=7' in page.inner_text('body')
    page.goto(f'{address}search.html?q=click')  # the index has the name of the run's experiment
    page.wait_for_selector('#search-results ul.search li a', timeout=20_000)
    assert page.evaluate('() => window.hit') is None
    assert [url for url in asked if not url.startswith((address, 'data:'))] == []
    assert dialogs == []
    page.close()
    what = 'hostile texts in what a run holds, each in every place: a browser executes none'
    record(what, tries=len(PAYLOADS), survived=len(PAYLOADS))


ESCAPED = f'<script>{HIT}</script><img src="x.png" onerror="{HIT}"><a href="javascript:{HIT}">a</a>'


@pytest.mark.parametrize('name', ['runs/index', 'experiments/train', 'reports/mamlpp'])
def test_the_policy_of_a_page_stops_what_got_into_it(docs, browser, address, name):
    "The same markup is executed where the browser is told to pass over the policy."
    text = page_text(docs, name).replace('<article', f'{ESCAPED}<article', 1)
    for passed_over in (False, True):
        page = browser.new_page(bypass_csp=passed_over)
        url = f'{address}{name}.html'
        page.route(url, lambda route: route.fulfill(body=text, content_type='text/html'))
        page.goto(url)
        page.get_by_text('a', exact=True).first.dispatch_event('click')
        assert page.evaluate('() => window.hit') == (7 if passed_over else None)
        assert page.evaluate('() => document.body.dataset.theme') == 'auto', "the theme's script"
        page.close()


# what would execute or look like the site's own, in what a page shows of a run
MARKS = '''() => {
  const out = [];
  for (const e of document.querySelectorAll('*')) {
    for (const a of e.attributes) {
      if (/^on/i.test(a.name)) out.push(`${e.tagName} ${a.name}`);
      if (/^\\s*(javascript|data:text)/i.test(a.value)) out.push(`${e.tagName} ${a.value}`);
    }
  }
  const inside = 'article :is(script, iframe, object, embed, form, base, meta, style, link)';
  for (const e of document.querySelectorAll(inside)) out.push(e.tagName);
  return out}'''


# the pieces: which runs are shown


def plant(root, *names):
    for name in names:
        folder = root / 'runs' / 'table' / name
        folder.mkdir(parents=True)
        (folder / 'notebook.ipynb').write_text('{}')
        (folder / 'result.json').write_text('{}')


@pytest.mark.skipif(not shutil.which('git'), reason='no git')
def test_the_site_shows_committed_runs(tmp_path, monkeypatch):
    import pages

    monkeypatch.setattr(pages, 'ROOT', tmp_path)
    plant(tmp_path, 'kept', 'mine', 'kept_smoke_seed0')

    def shown():
        return [folder.name for folder in pages.run_folders()]

    assert shown() == ['kept', 'mine'], 'an archive has no git: every run with a result'
    git(tmp_path, 'init', '-q')
    assert shown() == []
    git(tmp_path, 'add', 'runs/table/kept', 'runs/table/kept_smoke_seed0')
    assert shown() == ['kept']
    assert [path.parent.name for path in pages.run_files()] == ['kept', 'kept']
    (tmp_path / 'runs' / 'table' / 'kept' / 'result.json').unlink()
    assert shown() == [], 'a run without a result is none'


def test_a_link_out_of_the_runs_is_no_file_of_theirs(tmp_path, monkeypatch):
    import pages

    monkeypatch.setattr(pages, 'ROOT', tmp_path)
    plant(tmp_path, 'kept', 'mine')
    (tmp_path / 'secret.json').write_text('{}')
    for name, target in [('mine', tmp_path / 'secret.json'), ('kept', '../mine/notebook.ipynb')]:
        link = tmp_path / 'runs' / 'table' / name / 'result.json'
        link.unlink()
        link.symlink_to(target)
    assert [folder.name for folder in pages.run_folders()] == ['kept']


@pytest.mark.skipif(not shutil.which('git'), reason='no git')
def test_a_repository_that_git_cannot_read_is_an_error(tmp_path, monkeypatch):
    import pages

    monkeypatch.setattr(pages, 'ROOT', tmp_path)
    (tmp_path / '.git').write_text('gitdir: nowhere')
    said = 'git does not say what is committed in runs/: fatal: not a git repository'
    with pytest.raises(RuntimeError, match=said):
        pages.run_folders()


# the pieces: damaged runs


def with_fields(**fields):
    "Change the result of a run."
    return lambda result, nb: result.update(fields)


def with_cell(**cell):
    "Add a cell to the notebook of a run."
    return lambda result, nb: nb['cells'].append(cell)


def given_by_a_name(result, nb):
    for cell in nb['cells']:
        if 'injected-parameters' in cell['metadata'].get('tags', []):
            cell['source'] = 'seed = other'


def without_cells(result, nb):
    del nb['cells']


OUTPUT = dict(output_type='display_data', metadata={})
MARKDOWN = OUTPUT | dict(data={'text/markdown': '[there](../12_gone.ipynb)'})
HALF_A_PAIR = OUTPUT | dict(data={'text/html': '\ud800'})
PNG = OUTPUT | dict(data={'image/png': 'no', 'text/plain': 'a picture'})
CODE = dict(cell_type='code', id='a', metadata={}, execution_count=1)
DAMAGED = 'runs whose files are damaged, on the site: their pages say what is wrong'
DAMAGES = [
    (with_fields(seconds=None), 'seconds=None, no number'),
    (with_fields(seconds=True), 'seconds=True, no number'),
    (with_fields(seconds=math.nan), 'seconds=nan, no number'),
    (with_fields(params=[]), r'params=\[\], no object'),
    (with_fields(finished=20260101), 'finished=20260101, no text'),
    (with_fields(notebook=None), 'notebook=None, no text'),
    (with_fields(metrics=dict(test_accuracy=0.5)), 'test_accuracy=0.5, no mean, ci95 and n'),
    (with_fields(metrics=dict(test_accuracy=dict(mean=1, n=3, ci95='x'))), 'test_accuracy='),
    (with_fields(scale=3, device='\ud800'), 'scale=3, no text'),
    (with_cell(cell_type='markdown'), r'cell \d+ of notebook.ipynb is malformed'),
    (with_cell(**CODE, source=1, outputs=[]), r'cell \d+ of notebook.ipynb is malformed'),
    (with_cell(**CODE, source='', outputs=[MARKDOWN]), DEAD),
    (given_by_a_name, 'its parameters cannot be read: malformed node'),
    (with_cell(**CODE, source='', outputs=[HALF_A_PAIR]), 'a cell cannot be shown: UnicodeEncode'),
    (without_cells, 'notebook.ipynb has no cells'),
]


@pytest.fixture
def run_kept(tmp_path, monkeypatch):
    "A run in a repository of its own: its folder, its page, and the links there."
    import build  # and with it the others, while the repository is this one
    import checked
    import pages

    source = ROOT / 'runs' / 'mamlpp_t4' / 'maml_1shot_long_seed0'
    folder = tmp_path / source.relative_to(ROOT)
    folder.mkdir(parents=True)
    for name in ('result.json', 'notebook.ipynb'):
        shutil.copy(source / name, folder)
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    monkeypatch.setattr(pages, 'ROOT', tmp_path)
    monkeypatch.setattr(checked, 'ROOT', tmp_path)

    def kept():
        links = pages.Links()
        (page,) = links.pages.values()
        return folder, page, links

    return kept


def shown(page, links, folder):
    "What is made of a run, written as it is for Sphinx, and what is wrong with it."
    from build import written
    from runs import run_list, run_page

    made, about = run_page(page, links)
    written(folder / 'page.ipynb', json.dumps(made, ensure_ascii=False))
    assert 'maml_1shot_long_seed0' in run_list(links).replace('\\', '')
    nbformat.validate(nbformat.read(folder / 'page.ipynb', 4))
    return made, about['faults']


@pytest.mark.parametrize('damage,words', DAMAGES)
def test_a_damaged_run_has_a_page_that_says_so(run_kept, record, damage, words):
    folder, page, links = run_kept()
    assert shown(page, links, folder)[1] == []
    parts = [folder / name for name in ('result.json', 'notebook.ipynb')]
    held = [json.loads(part.read_text(encoding='utf-8')) for part in parts]
    damage(*held)
    for part, now in zip(parts, held):
        part.write_text(json.dumps(now), encoding='utf-8')
    made, (fault,) = shown(page, links, folder)
    assert re.search(words, fault)
    assert made['cells'][1]['source'].startswith(':::{admonition} Not everything of this run')
    record(DAMAGED, tries=1, survived=1)


@pytest.mark.parametrize('name', ['result.json', 'notebook.ipynb'])
@pytest.mark.parametrize('text', [b'{', b'[]', b'\xff', b'[' * 100_000, b''])
def test_a_run_whose_file_is_no_json_has_a_page(run_kept, record, name, text):
    folder, page, links = run_kept()
    (folder / name).write_bytes(text)
    _, faults = shown(page, links, folder)
    assert re.match(f'{name} (cannot be read: |holds no object)', faults[0])
    record(DAMAGED, tries=1, survived=1)


@pytest.mark.parametrize('damage', [without_cells, with_cell(cell_type='markdown')])
def test_an_experiment_passes_over_a_damaged_run(run_kept, links, damage):
    folder, page, of_run = run_kept()
    train = page_named(links, 'experiments/train')
    nb = dict(cells=[CODE | dict(source='f()', outputs=[])])
    chosen = functools.partial(nearest_run_of, train, nb, of_run)
    assert chosen() == page
    executed = json.loads((folder / 'notebook.ipynb').read_text(encoding='utf-8'))
    executed['cells'].append(CODE | dict(source='f()', outputs=[HALF_A_PAIR]))
    (folder / 'notebook.ipynb').write_text(json.dumps(executed), encoding='utf-8')
    assert chosen() is None, 'its output cannot be shown'
    executed['cells'].pop()
    damage({}, executed)
    (folder / 'notebook.ipynb').write_text(json.dumps(executed), encoding='utf-8')
    assert chosen() is None


def nearest_run_of(page, nb, links):
    from build import nearest_run

    return nearest_run(page, nb, links)


def test_a_picture_that_is_none_is_not_shown(run_kept):
    from convert import cells

    _, page, links = run_kept()
    (cell,) = cells(dict(cells=[CODE | dict(source='f()', outputs=[PNG])]), page, links)
    assert cell['outputs'][0]['data'] == {'text/plain': 'a picture'}


def test_a_dead_link_of_our_own_is_an_error_beside_that_of_a_run(links):
    "An experiment has both."
    from convert import cells

    train = page_named(links, 'experiments/train')
    (cell,) = cells(dict(cells=[CODE | dict(source='f()', outputs=[MARKDOWN])]), train, links)
    assert 'href="#"' in cell['outputs'][0]['data']['text/html']
    text = dict(cell_type='markdown', metadata={}, source='[there](../12_gone.ipynb)')
    with pytest.raises(ValueError, match=DEAD):
        cells(dict(cells=[text]), train, links)
    with pytest.raises(ValueError, match=DEAD):
        report = page_named(links, 'reports/mamlpp')
        cells(dict(cells=[CODE | dict(source='f()', outputs=[MARKDOWN])]), report, links)


# the pieces: text


def test_front_matter_directives_and_callouts():
    from convert import directives
    from prose import callouts, front_matter

    matter = '---\ntitle: MAML\ndescription: "a: b"\noutput-file: maml.html\n---\n'
    read = {'title': 'MAML', 'description': 'a: b', 'output-file': 'maml.html'}
    assert front_matter(matter) == read
    assert front_matter('text') == {}
    cell = '#| echo: false\n#| fig-alt: "two curves"\nplot()\n#| no directive'
    found = {'echo': 'false', 'fig-alt': 'two curves'}
    assert directives(cell) == (found, 'plot()\n#| no directive')
    assert callouts('::: {.callout-tip}\nx\n:::') == ':::{tip}\nx\n:::'
    titled = callouts(':::{.callout-warning title="Take care"}\nx\n:::')
    assert titled == ':::{admonition} Take care\n:class: warning\nx\n:::'


@pytest.fixture(scope='module')
def links():
    from pages import Links

    return Links()


def page_named(links, name):
    return next(page for page in links.pages.values() if page.name == name)


HOME = 'https://github.com/someone/fewshotmeta'


def test_links_go_to_pages_files_or_home_and_nowhere_else(links, monkeypatch):
    from prose import markdown

    monkeypatch.setattr(links, 'git', HOME)

    report = page_named(links, 'reports/mamlpp')
    maml = page_named(links, 'learners/maml')
    mamlpp = page_named(links, 'learners/mamlpp').source.removeprefix('nbs/')
    text = f'[a](../{mamlpp}#x) `[b](no.ipynb)` <!-- c -->'
    assert markdown(text, report, links) == '[a](../learners/mamlpp.html#x) `[b](no.ipynb)` '
    run = 'runs/mamlpp_t4/maml_1shot_long_seed0'
    assert links(f'../../{run}/notebook.ipynb', report) == f'../{run}.html'
    assert links(f'../../{run}/result.json', maml) == f'../{run}/result.json'
    assert links('../../Makefile', maml) == f'{links.git}/blob/main/Makefile'
    assert links('#here', maml) == '#here'
    assert links(f'{links.site}learners/maml.html#fast', report) == '../learners/maml.html#fast'
    assert links('https://arxiv.org/abs/1', maml) == 'https://arxiv.org/abs/1'
    wrong = r'_maml.ipynb: a link to 1_maml.ipynb, but there is no nbs/learners/1_maml.ipynb'
    with pytest.raises(ValueError, match=wrong):
        links('1_maml.ipynb', maml)


def test_a_repository_with_a_home_is_edited_and_opened_there(links, monkeypatch):
    monkeypatch.setattr(links, 'git', HOME)
    assert links.at_home('nbs/index.ipynb', 'edit') == f'{HOME}/edit/main/nbs/index.ipynb'
    opened = 'https://colab.research.google.com/github/someone/fewshotmeta/blob/main/'
    assert links.colab('nbs/index.ipynb') == f'{opened}nbs/index.ipynb'
    monkeypatch.setattr(links, 'git', 'https://elsewhere.org/fewshotmeta')
    assert links.colab('nbs/index.ipynb') == '', 'Colab opens what lies on GitHub'


def test_without_a_home_the_site_carries_what_its_own_pages_link_to(links, monkeypatch):
    "A run, which anyone may have committed, makes it carry nothing."
    from runs import commit_link

    monkeypatch.setattr(links, 'git', '')
    monkeypatch.setattr(links, 'beside', {})
    assert links.at_home('Makefile') == links.colab('nbs/index.ipynb') == ''
    maml = page_named(links, 'learners/maml')
    link = links('../../.github/CONTRIBUTING.md#here', maml)
    assert link == '../files/github/CONTRIBUTING.md'
    assert links.beside == {'files/github/CONTRIBUTING.md': '.github/CONTRIBUTING.md'}
    with pytest.raises(ValueError, match='set git_url in settings.ini'):
        links('..', maml)
    run = next(page for page in links.pages.values() if page.is_run)
    with pytest.raises(ValueError, match='a link to settings.ini, which only the home'):
        links('../../settings.ini', run)
    assert len(links.beside) == 1
    assert commit_link(dict(commit='0123456789'), links) == '`0123456`'


def test_a_run_keeps_its_links_when_a_room_moves(links):
    run = next(page for page in links.pages.values() if page.is_run)
    assert links('../12_hidra.ipynb', run) == '../../learners/hidra.html'
    with pytest.raises(ValueError, match='there is no nbs/12_gone.ipynb'):
        links('../12_gone.ipynb', run)
    with pytest.raises(ValueError, match='there is no nbs/12_hidra.ipynb'):
        links('../12_hidra.ipynb', page_named(links, 'reports/hidra'))


def test_nbdev_s_links_lead_to_the_pages(links):
    addresses = {url.partition('#')[0] for _, url in public_names()}
    assert addresses <= {f'{page.name}.html' for page in links.pages.values()}


def test_new_notebooks_find_their_section():
    from pages import in_order

    names = '''index data/02_banks data/03a_mine learners/01_backbones learners/10_maml
        learners/12a_mine learners/18a_yours training/03_fit engine/05_ranks engine/06_more
        lab/00_runs reports/findings howto/cluster howto/another 50_odd'''.split()
    order = in_order(names)
    assert order['Data'] == ['data/02_banks', 'data/03a_mine']
    learners = ['10_maml', '12a_mine', '18a_yours', '01_backbones']
    assert order['Learners'] == [f'learners/{name}' for name in learners]
    assert order['Engine'] == ['engine/05_ranks', 'engine/06_more']
    assert order['How-to'] == ['howto/cluster', '50_odd', 'howto/another']
    assert sorted(sum(order.values(), start=[])) == sorted(names)


# the pieces: cells


def code_cell(source, *outputs):
    return dict(cell_type='code', id='a', source=source, outputs=list(outputs), metadata={})


def test_a_run_s_outputs_go_to_the_same_code():
    from convert import with_outputs_of

    mine = [code_cell('%config x\nf(1)', 'smoke'), code_cell('g(2)', 'smoke')]
    executed = [code_cell('#| echo: false\nf(1)', 'run'), code_cell('g(3)', 'run')]
    nb, same = with_outputs_of(dict(cells=mine), dict(cells=executed))
    assert [cell['outputs'] for cell in nb['cells']] == [['run'], []]
    assert same == 1
    assert [cell['outputs'] for cell in mine] == [['smoke'], ['smoke']], 'the notebook is left'


def test_a_run_does_not_show_what_its_notebook_hides(links):
    from convert import cells

    run = next(page for page in links.pages.values() if page.is_run)
    nb = dict(cells=[code_cell('#| hide\nsetup()'), code_cell('f(1)')])
    assert [cell['source'] for cell in cells(nb, run, links)] == ['f(1)']


def displayed(kind, text):
    return dict(output_type='display_data', data={kind: text}, metadata={})


@pytest.mark.parametrize('kind', ['text/html', 'text/markdown', 'text/latex', 'image/svg+xml'])
def test_outputs_of_runs_are_sanitised_and_our_own_stay(links, kind):
    "An experiment shows a run's outputs, too."
    from convert import cells

    sources = ('f(1)', 'show_doc(f)')
    nb = dict(cells=[code_cell(source, displayed(kind, ESCAPED)) for source in sources])
    for name in ('experiments/train', 'reports/mamlpp'):
        page = page_named(links, name)
        made = json.dumps(cells(nb, page, links))
        assert ('<script' in made or '<img src=\\"x' in made) != page.shows_runs


def test_outputs_in_html_of_our_own_may_bring_scripts():
    "Those in Markdown may not: a report writes tables of what runs say."
    from build import brings_scripts

    def brings(kind, text):
        return brings_scripts(dict(cells=[code_cell('f()', displayed(kind, text))]))

    assert brings('text/html', '<div></div><SCRIPT>plot()</SCRIPT>')
    assert brings('text/html', '<button onclick="turn()">')
    assert not brings('text/html', '<table class="dataframe"></table>')
    assert not brings('text/markdown', ESCAPED)


def test_what_a_run_says_is_still_said():
    from safety import from_markdown, in_cell, in_words, sanitised

    table = '| a | b |\n|---|---:|\n| **x** | `1<2` |'
    (level, html), (deeper, words), _ = from_markdown(f'{table}\n\n## *Two* $x$ words\n\n$a^2$')
    assert level == 0 and '<strong>x</strong>' in html and '<code>1&lt;2</code>' in html
    assert '<table class="docutils">' in html and 'text-right' in html
    assert (deeper, words) == (2, 'Two x words')
    assert '<msup><mi>a</mi><mn>2</mn></msup>' in from_markdown('$a^2$')[0][1]
    assert in_words('a*b*\n`c`|d') == r'a\*b\* \`c\`\|d'
    assert in_cell('a`b|c') == r'``a`b\|c``'
    frame = '<table border="1" class="dataframe"><tbody><tr><th>a</th></tr></tbody></table>'
    assert sanitised(frame) == frame.replace(' border="1"', '')
    picture = '<img src="data:image/png;base64,AAAA" alt="a">'
    assert sanitised(picture) == picture


def test_folded_cells_are_folded_and_keep_their_outputs(links):
    from convert import cells

    page = page_named(links, 'learners/maml')
    output = dict(output_type='display_data', data={'text/plain': '1'}, metadata={})
    summary = '#| code-fold: show\n#| code-summary: "Exported source"\n#| exports\n'
    sources = ['#| code-fold: true\nplot()', 'plot()', f'{summary}def f(): ...']
    nb = dict(cells=[code_cell(source, output) for source in sources])
    folded, plain, exported = cells(nb, page, links)
    assert folded['metadata']['tags'] == ['hide-input'] and folded['outputs'] == [output]
    assert plain['metadata']['tags'] == [] and plain['outputs'] == [output]
    assert exported['cell_type'] == 'markdown'
    assert exported['source'].startswith('<details class="exported" open><summary>')


def test_what_draws_by_hand_is_folded(links):
    """A figure is seen without its code. A run may be older than the marks in its notebook.

    Pages of methods and how-tos show what their authors want to be seen.
    """
    from convert import DRAWN, code, directives

    shown = []
    for page in links.pages.values():
        own = re.match(r'nbs/(learners/1|howto/|reports/)', page.source)
        if page.is_run or own:
            continue
        nb = json.loads((ROOT / page.source).read_text(encoding='utf-8'))
        for cell in nb['cells']:
            found, source = directives(''.join(cell['source']))
            pictures = [o for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
            folded = found.get('code-fold') == 'true' or found.get('echo') == 'false'
            if pictures and DRAWN.search(source) and not folded:
                shown.append((page.name, cell['id']))
    assert shown == []
    run = next(page for page in links.pages.values() if page.is_run)
    for source, folded in (('plt.subplots(1, 2)', True), ('result.plot()', False)):
        tags = code(code_cell(source), run, links)['metadata']['tags']
        assert ('hide-input' in tags) == folded


def test_the_line_under_a_title_is_one():
    "nbdev reads one physical line; the rest would be lost."
    for path in (ROOT / 'nbs').rglob('*.ipynb'):
        if '.ipynb_checkpoints' in path.parts:
            continue
        source = json.loads(path.read_text(encoding='utf-8'))['cells'][0]['source']
        quote = ''.join(source).partition('\n> ')[2].partition('\n\n')[0]
        assert quote and '\n' not in quote.strip(), path


def test_what_a_terminal_shows_in_the_end():
    from convert import terminal

    assert terminal('\r 10%|#  | 1/10\r100%|###| 10/10\ndone\n') == 'done'
    assert terminal('a\rb\n\x1b[31mred\x1b[0m\n[IPKernelApp] WARNING | x') == 'b\nred'


def test_a_listing_in_html_is_a_listing():
    from convert import shown_html

    listing = '<pre><code class="language-c">if (a &lt; b &amp;&amp; c)\n</code></pre>'
    assert shown_html(listing) == {'text/markdown': '```c\nif (a < b && c)\n```'}
    table = shown_html('<style>x</style><table border="1"><tr></tr></table>')
    assert table == {'text/html': '<div class="table-wrapper"><table><tr></tr></table></div>'}


def test_pictures_in_words():
    from figures import alt_text

    source = "plt.xlabel('inner steps'); plt.ylabel('support loss')"
    before = 'Some text. The loss falls on *each* task, see [here](x.html):'
    words = 'support loss against inner steps. The loss falls on each task, see here'
    assert alt_text(source, before, 'H') == words
    assert alt_text('plot()', '', 'The **head**') == 'Figure: The head'
    assert alt_text('plot()', 'x', 'y', 'said in the cell') == 'said in the cell'


def as_png(figure):
    "A figure as the cells of a notebook give it."
    out = io.BytesIO()
    figure.savefig(out, dpi=100, bbox_inches='tight')
    return base64.b64encode(out.getvalue()).decode()


def test_plots_are_told_from_pictures_of_things():
    import numpy as np
    from figures import is_plot
    from matplotlib.figure import Figure
    from fewshotmeta.data.glyphs import glyphs

    figure = Figure(figsize=(5, 3))
    for ax in figure.subplots(1, 3):
        ax.plot([1, 3, 2], color='#0072B2')
        ax.set(xlabel='inner steps', ylabel='accuracy')
    assert is_plot(as_png(figure))
    images = glyphs('test').images
    characters = Figure(figsize=(5, 3))
    colours = Figure(figsize=(5, 3))
    for i, ax in enumerate(characters.subplots(3, 5).flat):
        ax.imshow(images[20 * i, 0].numpy(), cmap='gray_r')
        ax.axis('off')
    colours.subplots().imshow(np.random.default_rng(0).random((28, 28, 3)))
    assert not is_plot(as_png(characters))
    assert not is_plot(as_png(colours))


def test_functions_that_draw_say_what(links):
    from figures import alt_text, drawing

    assert any(call.endswith('show') for call in drawing())
    assert len(drawing()) >= 5, 'those of every wing'
    call = next(call for call in drawing() if '.' not in call)
    assert alt_text(f'{call}(x)', '', 'H') == f'{drawing()[call]}. H'


# the pieces: names


def test_a_table_gives_room_to_sentences_and_not_to_names():
    from safety import size_classes

    run = 'hidra_10_10way_1step_long_seed0'
    claim = 'a sentence that is longer than sixty characters, as claims are'
    assert size_classes(claim) == ['long']
    assert size_classes(f'{run} {run}') == size_classes(f'hypermaml_t2_tasks/{run}_{run}') == []
    assert size_classes('one, two') == ['short', 'tiny']


def test_an_argument_table_says_what_the_comments_say():
    from processing import rows, signature, table
    from fewshotmeta.learners.maml import MAML, Fast, task_losses

    written = signature('task_losses', task_losses, False)
    assert written == 'task_losses(logits, labels) -> Tensor'
    assert signature('f', lambda a, *, b=1: 0, True) == 'f(a, *, b=1)'
    assert r'| **labels** | `Tensor` | (tasks, n), integers |' in table(rows(task_losses))
    assert r'`int \| None`' in table(rows(MAML))
    assert len(rows(Fast)) == 3


def test_a_class_lists_what_later_cells_give_it(monkeypatch):
    import processing
    from fastcore.basics import patch
    from nbdev.showdoc import show_doc

    class InCell:
        def own(self):
            "Do one thing."

    class Whole(InCell):
        def own(self):
            "Do one thing."

        def told(self):
            "Do another."

        @property
        def size(self):
            "How large it is."

    def on_disk(f):
        return Whole if f is InCell else f

    monkeypatch.setattr(processing, 'on_disk', on_disk)
    text = processing.members(InCell)
    assert '{py:method} own()' in text and '{py:method} told' not in text
    assert 'Told below: [told](#incell.told), [size](#incell.size).' in text
    assert 'Told below' not in processing.members(Whole)

    @patch
    def patched(self: InCell):
        "Do a third."

    text = processing.members(InCell)
    assert '{py:method} patched' not in text, 'described twice: here, and where it is patched'

    class Borrower:
        lent = InCell.patched

    assert '{py:method} lent' in processing.members(Borrower), 'described nowhere'
    written = show_doc(Whole.size, renderer=processing.Documented, name='Whole.size')
    assert written._repr_markdown_().startswith('::::::{py:property} Whole.size\n')
    assert 'How large it is.' in written._repr_markdown_()


class Patched:
    "Something that a later cell gives a method."


def test_a_decorated_method_has_its_class_s_name():
    import processing
    import torch
    from fastcore.basics import patch
    from nbdev.showdoc import show_doc

    @patch
    @torch.no_grad()
    def predict(
        self: Patched,
        x: int,  # what is asked
    ) -> int:
        "Answer."
        return x

    written = show_doc(Patched.predict, renderer=processing.Documented)._repr_markdown_()
    assert written.startswith('::::::{py:method} Patched.predict(x)'), written
    assert '| **x** | `int` | what is asked |' in written


def test_a_name_belongs_to_the_notebook_that_exports_it(monkeypatch):
    "Two rooms may have one of the same name."
    import processing
    from execnb.nbio import dict2nb, mk_cell
    from fewshotmeta.learners.maml import task_losses

    nb = dict2nb(dict(cells=[mk_cell('1 + 1'), mk_cell('#| default_exp training.fit')]))
    assert processing.home_of(nb) == 'fewshotmeta.training.fit'
    assert processing.home_of(dict2nb(dict(cells=[]))) == ''
    monkeypatch.setattr(processing.Documented, 'home', 'fewshotmeta.training.fit')
    assert processing.module_of(run_beside) == 'fewshotmeta.training.fit'
    assert processing.module_of(task_losses) == 'fewshotmeta.learners.maml'


def test_an_argument_that_stands_for_several_has_its_row():
    "It has its comment, and what is returned has none of it."
    from processing import rows, table

    def f(
        a,  # the first
        *others: int,  # more of them
        **options,  # what is left
    ) -> int:
        return a

    assert rows(f) == [
        ('a', '', 'the first'),
        ('*others', 'int', 'more of them'),
        ('**options', '', 'what is left'),
    ]
    assert r'| **\*\*options** |  | what is left |' in table(rows(f))


def test_the_inner_step_of_a_number():
    from runs import by_step, in_steps, step_of

    def result(headline, **metrics):
        measured = {name: dict(mean=mean, ci95=None, n=8) for name, mean in metrics.items()}
        return dict(metrics=measured | dict(test_accuracy=dict(mean=headline, ci95=None, n=8)))

    one = result(0.75, accuracy_step_0=0.2, accuracy_step_1=0.75, accuracy_step_10=0.75)
    assert step_of(one) == 10, 'the last that has this number'
    assert in_steps(one) == 'after inner step 10'
    ways = result(0.5, accuracy_2way_step1=0.75, accuracy_5way_step0=0.2, accuracy_5way_step1=0.5)
    assert in_steps(ways) == '5-way, after inner step 1'
    assert list(by_step(ways)[1]) == [0, 1]
    assert in_steps(result(0.5, accuracy_step_0=0.5)) == 'without an inner step'
    assert in_steps(result(0.5, accuracy_step_0=0.25)) == ''
    assert in_steps(dict(metrics={})) == ''


# the pieces: equations


def test_equations():
    from mathml import mathml

    assert 'ℒ' in mathml(r'\mathcal L')
    assert re.search('<munder><mo [^>]*movablelimits="true"', mathml(r'\min_\theta x', True))
    assert mathml('a<b').count('&lt;') == 1
    aligned = mathml(r'\begin{aligned}a&=b\\ c&=d\end{aligned}', True)
    assert aligned.count('<mtr>') == 2
    assert 'text-align: right' in aligned
    assert 'mathvariant' not in mathml(r'\mathbb E')


@pytest.mark.parametrize(
    'tex, why',
    [(r'\foo x', r'no \\foo'), (r'\frac{1', 'unbalanced'), ('x_', 'cannot read|unbalanced')],
)
def test_a_bad_equation_is_an_error(tex, why):
    from mathml import mathml

    with pytest.raises(ValueError, match=why):
        mathml(tex)


def test_a_bad_equation_stops_the_build_and_says_where(tmp_path):
    (tmp_path / 'conf.py').write_text(
        "extensions = ['myst_parser', 'mathml']\n"
        "html_math_renderer = 'mathml'\n"
        "myst_enable_extensions = ['dollarmath']\n"
    )
    (tmp_path / 'index.md').write_text('# T\n\nSee $\\fooo{x}$ here.\n')
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-q', str(tmp_path), str(tmp_path / 'out')],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(SITE)),
    )
    assert done.returncode
    assert r'index: no \fooo in the equation' in done.stderr, done.stderr
