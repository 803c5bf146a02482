"""The site: built from clean, then read as its readers do, in a browser; and the pieces that make it."""

import functools, http.server, json, os, re, shutil, subprocess, sys, threading, time, urllib.parse, urllib.request
import pytest
from conftest import ROOT

SITE = ROOT / 'nbs' / '_site'
sys.path.insert(0, str(SITE))
pytestmark = pytest.mark.xdist_group('site')  # one build, one browser
FLAGS = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()


def make(root):
    "`make docs`, in this environment."
    return subprocess.run(
        [sys.executable, str(root / 'nbs' / '_site' / 'build.py')],
        capture_output=True,
        text=True,
        env=os.environ | dict(OMP_NUM_THREADS='1'),
    )


@pytest.fixture(scope='session')
def built(tmp_path_factory):
    "A copy of the repository with its site, built from clean."
    root = tmp_path_factory.mktemp('site') / 'fewshotmeta'
    shutil.copytree(
        ROOT,
        root,
        ignore=shutil.ignore_patterns(
            '.git',
            '.venv',
            '_docs',
            '_proc',
            '__pycache__',
            '.pytest_cache',
            '.ipynb_checkpoints',
            '*_smoke*',
            '*.safetensors',
        ),
    )
    start = time.time()
    done = make(root)
    print(f'built from clean in {time.time() - start:.0f} s')
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope='session')
def docs(built):
    return built / '_docs'


@pytest.fixture(scope='session')
def names(docs):
    "All pages, without suffix."
    return sorted(
        p.relative_to(docs).with_suffix('').as_posix()
        for p in docs.rglob('*.html')
        if '_static' not in p.parts
    )


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='session')
def address(docs):
    "The site, served from this machine."
    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Quiet, directory=str(docs))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()


def chromium():
    "A Chromium's path; Debian's package is installed where root can."

    def found():
        return next(
            filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
        )

    if found() or os.geteuid() or not shutil.which('apt-get'):
        return found()
    for args in (
        ['update', '-qq'],
        ['install', '-y', '-qq', '--no-install-recommends', 'chromium'],
    ):
        if subprocess.run(
            ['apt-get', *args],
            capture_output=True,
            env=os.environ | dict(DEBIAN_FRONTEND='noninteractive'),
        ).returncode:
            return
    return found()


@pytest.fixture(scope='session')
def browser():
    path = chromium()
    if not path:
        pytest.skip('no Chromium: it is not installed, and cannot be here')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


# what a reader sees outside code and equations, what the page refers to, and what does not fit
LOOK = '''() => {
  const prose = [], walk = document.createTreeWalker(document.querySelector('article'), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) if (!walk.currentNode.parentElement.closest('pre, code, math, script, style, .sig')) prose.push(walk.currentNode.data);
  return {
    prose: prose.join(' '), ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    links: [...document.querySelectorAll('a[href]')].map(e => e.href),
    images: [...document.querySelectorAll('article img')].map(e => [e.src, e.alt, e.naturalWidth]),
    parts: [...document.querySelectorAll('link[href]:not([rel=canonical]), script[src]')].map(e => e.href || e.src),
    raw: [...document.querySelectorAll('math')].filter(e => e.textContent.includes('\\\\')).length,
    description: document.querySelector('meta[name=description]')?.content,
    actions: [...document.querySelectorAll('.page-actions a')].map(e => [e.textContent, e.href])}}'''
WIDTH = '''() => [...document.querySelectorAll('html, body, .page, .main, .content, .article-container, article')].filter(e => e.scrollWidth > Math.max(e.clientWidth, innerWidth) + 1)
  .map(e => `${e.tagName}.${e.className} ${e.scrollWidth}`)'''

# of each kind of element three are left: a page of code has thousands of words in five colours
THIN = '''() => { const seen = {};
  for (const e of document.querySelectorAll('pre span, article :is(td, th, p, li, dt, dl, code, a, img, details):not(a *)')) {
    const kind = [e.tagName, e.className, e.parentElement?.className, e.parentElement?.parentElement?.className].join();
    if ((seen[kind] = (seen[kind] || 0) + 1) > 3) e.remove(); }}'''


def faults(page, name):
    "What axe-core says of a page in light and in dark."
    from axe_playwright_python.sync_playwright import Axe

    out = {}
    page.evaluate(THIN)
    page.add_style_tag(
        content='* { transition: none !important }'
    )  # axe-core would see a colour on its way
    for theme in ('light', 'dark'):
        page.emulate_media(color_scheme=theme)
        found = (
            Axe()
            .run(
                page,
                None if name == 'index' else 'article',
                options=dict(
                    runOnly=['color-contrast', 'image-alt', 'link-name', 'document-title'],
                    resultTypes=['violations'],
                ),
            )
            .response['violations']
        )
        out[theme] = [
            (v['id'], n['target'], n['any'][0]['message'][:160] if n['any'] else '')
            for v in found
            for n in v['nodes'][:3]
        ]
    page.emulate_media(color_scheme='light')
    return out


@pytest.fixture(scope='session')
def seen(browser, address, names):
    "Every page as a browser shows it: what it holds, what it asked for, what it complained about. Runs look alike: two of them stand for all before axe-core, which takes long."
    out, page = {}, browser.new_page(color_scheme='light', viewport=dict(width=1280, height=900))
    alike = set([n for n in names if n.startswith('runs/') and n != 'runs/index'][2:])
    said, asked = [], []
    page.on('console', lambda m: m.type in ('error', 'warning') and said.append(m.text))
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on(
        'requestfailed',
        lambda r: r.failure != 'net::ERR_ABORTED' and said.append(f'failed: {r.url}'),
    )  # aborted: the next page came first
    page.on('request', lambda r: asked.append(r.url))
    page.on('response', lambda r: r.status >= 400 and said.append(f'{r.status}: {r.url}'))
    for name in names:
        said.clear()
        asked.clear()
        page.goto(f'{address}{name}.html')
        out[name] = page.evaluate(LOOK) | dict(said=said[:], asked=asked[:])
        page.set_viewport_size(dict(width=390, height=844))
        out[name]['wide'] = page.evaluate(WIDTH)
        page.set_viewport_size(dict(width=1280, height=900))
        if name not in alike:
            out[name]['faults'] = faults(page, name)
    page.close()
    return out


def notebooks_of(seen):
    return {n: p for n, p in seen.items() if p['actions']}


def test_pages_load_without_a_complaint(seen):
    assert len(seen) > 80 and {n: p['said'] for n, p in seen.items() if p['said']} == {}


def test_nothing_is_asked_of_another_machine(seen, address):
    foreign = {
        n: [u for u in p['asked'] + p['parts'] if not u.startswith((address, 'data:'))]
        for n, p in seen.items()
    }
    assert {n: u for n, u in foreign.items() if u} == {}


def test_links_lead_somewhere(seen, address, docs):
    broken = []
    for name, page in seen.items():
        for link in page['links'] + [src for src, _, _ in page['images']]:
            if not link.startswith(address):
                continue
            path, _, fragment = urllib.parse.unquote(link.removeprefix(address)).partition('#')
            path = path.partition('?')[0] or 'index.html'
            if not (docs / path).is_file():
                broken.append((name, path))
            elif fragment and fragment not in seen[path.removesuffix('.html')]['ids']:
                broken.append((name, f'{path}#{fragment}'))
    assert broken == []


def test_own_pages_are_linked_in_place(seen):
    from pages import Links

    assert not [(n, u) for n, p in seen.items() for u in p['links'] if u.startswith(Links().site)]


def test_pictures_are_there_and_say_what_they_show(seen):
    images = [(n, *i) for n, p in seen.items() for i in p['images']]
    assert (
        len(images) > 100
        and [
            i
            for i in images
            if not i[3] or len(i[2]) < 15 or re.search(r'[`$\\]|]\(|^_|\.png', i[2])
        ]
        == []
    )


def test_no_markup_shows(seen):
    raw = re.compile(r'#\||:::|\{\.\w|\$|\\[a-zA-Z]{2,}|\]\(|\*\*|<!--|\{target=')
    assert {n: m.group() for n, p in seen.items() if (m := raw.search(p['prose']))} == {} and [
        n for n, p in seen.items() if p['raw']
    ] == []


def test_pages_say_what_they_are(seen):
    from pages import Links

    pages = notebooks_of(seen)
    assert {p.name for p in Links().pages.values()} <= set(pages)
    for name, page in pages.items():
        actions = dict(page['actions'])
        assert page['description'] and {'Download notebook', 'Open in Colab'} <= set(actions), name
        assert actions['Open in Colab'].startswith(
            Links()
            .git.replace('https://', 'https://colab.research.google.com/')
            .replace('github.com', 'github')
            + '/blob/main/'
        ) and ('Edit' in actions or name.startswith('runs/')), name


def test_phone_pages_do_not_scroll_sideways(seen):
    assert {n: p['wide'] for n, p in seen.items() if p['wide']} == {}


def test_sidebar_has_the_reading_order(browser, address):
    page = browser.new_page()
    page.goto(address)
    captions = page.evaluate(
        "[...document.querySelectorAll('.sidebar-tree .caption-text')].map(e => e.textContent)"
    )
    links = page.evaluate(
        "[...document.querySelectorAll('.sidebar-tree a')].map(e => e.getAttribute('href').replace('.html', ''))"
    )
    page.close()
    order = [
        c
        for c in (
            'Start',
            'Tasks',
            'Learners',
            'Training and measuring',
            'Experiments',
            'Reports',
            'Findings',
            'How-to',
        )
        if c in captions
    ]
    assert captions[: len(order)] == order and len(order) >= 7
    wanted = [
        '#',
        'data',
        'episodes',
        'augment',
        'layers',
        'kernels',
        'backbones',
        'maml',
        'mamlpp',
        'hidra',
        'hypermaml',
        'training',
        'evaluation',
        'experiments/train',
        'runs/index',
        'reports/mamlpp',
        'reports/hypermaml',
        'findings',
        'runs',
    ]
    assert [n for n in links if n in wanted] == wanted


def test_search_finds_hidra(browser, address):
    page = browser.new_page()
    page.goto(f'{address}search.html?q=hidra')
    page.wait_for_selector('#search-results ul.search li a', timeout=20_000)
    page.wait_for_function(
        "document.querySelectorAll('#search-results ul.search li').length > 5", timeout=20_000
    )
    found = page.evaluate(
        "[...document.querySelectorAll('#search-results ul.search li a')].map(e => e.getAttribute('href'))"
    )
    page.close()
    assert any(f.startswith('hidra.html') for f in found[:8]) and any(
        f.startswith('reports/hidra.html') for f in found
    ), found


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_contrast(seen, theme):
    "axe-core's checks, on every page but the runs, of which some stand for all."
    checked = {n: p['faults'][theme] for n, p in seen.items() if 'faults' in p}
    assert len(checked) > 40 and {n: f for n, f in checked.items() if f} == {}


def test_every_public_name_is_described_on_its_page(seen, docs):
    "With its source, which needs no network."
    from fewshotmeta._modidx import d

    for module, names in d['syms'].items():
        for name, (url, _) in names.items():
            short = name.removeprefix(f'{module}.')
            if '.' in short or short.startswith('_'):
                continue
            page, _, fragment = url.partition('#')
            assert fragment in seen[page.removesuffix('.html')]['ids'], f'{name} is not on {page}'
            text = re.sub(
                r'<[^>]+>',
                '',
                ''.join(
                    re.findall(
                        r'(?s)<details class="exported".*?</details>', (docs / page).read_text()
                    )
                ),
            )
            assert re.search(rf'\b(def|class) {short}\b', text), (
                f'the source of {name} is not on {page}'
            )


def test_experiments_show_a_run_and_no_smoke_test(docs):
    for path in (ROOT / 'nbs' / 'experiments').glob('*.ipynb'):
        text = (docs / 'experiments' / f'{path.stem}.html').read_text()
        assert (
            re.search(r'those of an executed run, <a[^>]*href="\.\./runs/', text)
            and 'scale smoke' not in text
        ), path.stem
        pictures = {
            d
            for c in json.loads(path.read_text())['cells']
            for o in c.get('outputs', [])
            if (d := ''.join(o.get('data', {}).get('image/png', '')))
        }
        assert pictures and not [
            i for i in re.findall(r'_images/(\w+)\.png', text) if i in {digest(d) for d in pictures}
        ], path.stem


def digest(png):
    "The name that MyST-NB gives a picture."
    import base64, hashlib

    return hashlib.sha256(base64.b64decode(png)).hexdigest()


def test_a_run_comes_with_its_files(docs):
    from pages import run_folders

    pages = sorted((docs / 'runs').glob('*/*.html'))
    assert len(pages) == len(run_folders()) > 50
    for page in pages:
        result = json.loads((page.with_suffix('') / 'result.json').read_text())
        assert (page.with_suffix('') / 'notebook.ipynb').is_file() and re.search(
            rf'\b{result["scale"]}\b', page.read_text().partition('<article')[2]
        ), page


def first_words(nb):
    "Of the text after the title."
    return [c for c in nb['cells'] if c['cell_type'] == 'markdown'][1]['source']


def test_only_what_changed_is_made_again(built):
    "One sentence more in one notebook: its page is written, and the one that lists it; the others are left."
    docs, path = built / '_docs', built / 'nbs' / '14_reptile.ipynb'
    before = {p: p.stat().st_mtime_ns for p in docs.rglob('*.html')}
    nb = json.loads(path.read_text())
    first_words(nb).append('\n\nA sentence that was not there.')
    path.write_text(json.dumps(nb))
    start = time.time()
    done = make(built)
    print(f'one page again in {time.time() - start:.1f} s')
    changed = {p.stem for p in before if p.stat().st_mtime_ns != before[p]}
    assert (
        done.returncode == 0
        and 'A sentence that was not there.' in (docs / 'reptile.html').read_text()
    ), done.stderr
    assert 'reptile' in changed and changed <= {'reptile', 'index', 'search'}, changed


def test_serving_follows_a_notebook(built):
    "Saved, and the page has it."
    with open(built / 'serve.log', 'w') as log:
        p = subprocess.Popen(
            [
                sys.executable,
                '-u',
                str(built / 'nbs' / '_site' / 'build.py'),
                '--serve',
                '--port',
                '0',
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def text():
        return (built / 'serve.log').read_text()

    try:
        wait(lambda: 'http://localhost:' in text(), 120, text)
        url = re.search(r'http://localhost:\d+/', text()).group()

        def read():
            return urllib.request.urlopen(f'{url}ranks.html').read().decode()

        assert '__made' in read() and 'Saved just now.' not in read()
        path = built / 'nbs' / '18_ranks.ipynb'
        nb = json.loads(path.read_text())
        first_words(nb).append('\n\nSaved just now.')
        path.write_text(json.dumps(nb))
        start = time.time()
        wait(lambda: 'Saved just now.' in read(), 60, text)
        print(f'saved to seen: {time.time() - start:.1f} s')
    finally:
        p.terminate()
        p.wait(20)


def wait(what, seconds, say):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, say()
        time.sleep(0.1)


# the pieces


def test_front_matter_directives_and_callouts():
    from convert import callouts, directives, front_matter

    assert (
        front_matter('---\ntitle: MAML\ndescription: "a: b"\noutput-file: maml.html\n---\n')
        == {'title': 'MAML', 'description': 'a: b', 'output-file': 'maml.html'}
        and front_matter('text') == {}
    )
    assert directives('#| echo: false\n#| fig-alt: "two curves"\nplot()\n#| no directive') == (
        {'echo': 'false', 'fig-alt': 'two curves'},
        'plot()\n#| no directive',
    )
    assert callouts('::: {.callout-tip}\nx\n:::') == ':::{tip}\nx\n:::'
    assert (
        callouts(':::{.callout-warning title="Take care"}\nx\n:::')
        == ':::{admonition} Take care\n:class: warning\nx\n:::'
    )


def test_links_go_to_pages_files_or_home_and_nowhere_else():
    from convert import markdown
    from pages import Links

    links = Links()
    report, maml = links.pages['nbs/reports/mamlpp.ipynb'], links.pages['nbs/10_maml.ipynb']
    assert (
        markdown('[a](../11_mamlpp.ipynb#x) `[b](no.ipynb)` <!-- c -->', report, links)
        == '[a](../mamlpp.html#x) `[b](no.ipynb)` '
    )
    assert (
        links('../../runs/mamlpp_t4/maml_1shot_short_seed0/notebook.ipynb', report)
        == '../runs/mamlpp_t4/maml_1shot_short_seed0.html'
    )
    assert (
        links('../runs/mamlpp_t4/maml_1shot_short_seed0/result.json', maml)
        == 'runs/mamlpp_t4/maml_1shot_short_seed0/result.json'
    )
    assert (
        links('../Makefile', maml) == f'{links.git}/blob/main/Makefile'
        and links('#here', maml) == '#here'
    )
    assert (
        links(f'{links.site}maml.html#fast', report) == '../maml.html#fast'
        and links('https://arxiv.org/abs/1', maml) == 'https://arxiv.org/abs/1'
    )
    with pytest.raises(
        ValueError, match=r'10_maml.ipynb: a link to 1_maml.ipynb, but there is no nbs/1_maml.ipynb'
    ):
        links('1_maml.ipynb', maml)


def test_a_run_s_outputs_go_to_the_same_code():
    from convert import with_outputs_of

    def cell(source, *outputs):
        return dict(cell_type='code', source=source, outputs=list(outputs), metadata={})

    nb, same = with_outputs_of(
        dict(cells=[cell('%config x\nf(1)', 'smoke'), cell('g(2)', 'smoke')]),
        dict(cells=[cell('#| echo: false\nf(1)', 'run'), cell('g(3)', 'run')]),
    )
    assert [c['outputs'] for c in nb['cells']] == [['run'], []] and same == 1


def test_a_run_does_not_show_what_its_notebook_hides():
    from convert import cells
    from pages import Links

    links = Links()

    def cell(source):
        return dict(cell_type='code', id='a', source=source, outputs=[], metadata={})

    made = cells(
        dict(cells=[cell('#| hide\nsetup()'), cell('f(1)')]),
        next(p for p in links.pages.values() if p.is_run),
        links,
    )
    assert [c['source'] for c in made] == ['f(1)']


def test_new_notebooks_find_their_section():
    from pages import in_order

    order = in_order(
        [
            'index',
            '00a_data',
            '10_maml',
            '12a_mine',
            '18_ranks',
            '18a_yours',
            '20_training',
            '24_more',
            'findings',
            'howto/cluster',
            'howto/another',
            '50_odd',
        ]
    )
    assert order['Learners'] == ['10_maml', '12a_mine', '18a_yours'] and order[
        'Training and measuring'
    ] == ['20_training', '18_ranks', '24_more']
    assert order['How-to'] == ['howto/cluster', 'howto/another'] and order[
        'Runs, batches, files'
    ] == ['50_odd']


def test_what_a_terminal_shows_in_the_end():
    from convert import terminal

    assert (
        terminal('\r 10%|#  | 1/10\r100%|###| 10/10\ndone\n') == 'done'
        and terminal('a\rb\n\x1b[31mred\x1b[0m\n[IPKernelApp] WARNING | x') == 'b\nred'
    )


def test_pictures_in_words():
    from convert import alt_text

    assert (
        alt_text(
            "plt.xlabel('inner steps'); plt.ylabel('support loss')",
            'Some text. The loss falls on *each* task, see [here](x.html):',
            'H',
        )
        == 'support loss against inner steps. The loss falls on each task, see here'
    )
    assert (
        alt_text('plot()', '', 'The **head**') == 'Figure: The head'
        and alt_text('plot()', 'x', 'y', 'said in the cell') == 'said in the cell'
    )


def test_an_argument_table_says_what_the_comments_say():
    from processing import rows, signature, table
    from fewshotmeta.learners.maml import MAML, Fast, task_losses

    assert (
        signature('task_losses', task_losses, False) == 'task_losses(logits, labels) -> Tensor'
        and signature('f', lambda a, *, b=1: 0, True) == 'f(a, *, b=1)'
    )
    assert (
        r'| **labels** | `Tensor` | (tasks, n), integers |' in table(rows(task_losses))
        and r'`int \| None`' in table(rows(MAML))
        and len(rows(Fast)) == 3
    )


def test_equations():
    from mathml import mathml

    assert (
        'ℒ' in mathml(r'\mathcal L')
        and re.search('<munder><mo [^>]*movablelimits="true"', mathml(r'\min_\theta x', True))
        and mathml('a<b').count('&lt;') == 1
    )
    aligned = mathml(r'\begin{aligned}a&=b\\ c&=d\end{aligned}', True)
    assert (
        aligned.count('<mtr>') == 2
        and 'text-align: right' in aligned
        and 'mathvariant' not in mathml(r'\mathbb E')
    )
    for tex, why in (
        (r'\foo x', r"no \\foo"),
        (r'\frac{1', 'unbalanced'),
        (r'x_', 'cannot read|unbalanced'),
    ):
        with pytest.raises(ValueError, match=why):
            mathml(tex)


def test_a_bad_equation_stops_the_build_and_says_where(tmp_path):
    (tmp_path / 'conf.py').write_text(
        "extensions, html_math_renderer, myst_enable_extensions = ['myst_parser', 'mathml'], 'mathml', ['dollarmath']"
    )
    (tmp_path / 'index.md').write_text('# T\n\nSee $\\fooo{x}$ here.\n')
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-q', str(tmp_path), str(tmp_path / 'out')],
        capture_output=True,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(SITE)),
    )
    assert done.returncode and r'index: no \fooo in the equation' in done.stderr, done.stderr
