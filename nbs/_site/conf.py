"""Sphinx's configuration of the site; build.py calls it."""

import json, sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pages import ROOT, settings

_s = settings()
project, author, copyright, language = (
    _s['title'],
    _s['author'],
    f'2026 onwards, {_s["author"]}',
    'en',
)
extensions = ['myst_nb', 'sphinx.ext.linkcode', 'sphinx.ext.githubpages', 'mathml']
html_theme, html_title, html_static_path, templates_path = (
    'furo',
    _s['title'],
    ['static'],
    ['templates'],
)
html_css_files, html_favicon, html_logo = ['site.css'], 'static/favicon.svg', 'static/favicon.svg'
nb_code_prompt_show, nb_code_prompt_hide = 'Code', 'Code'
html_show_sourcelink = html_copy_source = html_use_index = False
html_math_renderer = 'mathml'
html_baseurl = f'{_s["doc_host"]}{_s["doc_baseurl"]}/'
pygments_style, pygments_dark_style = 'a11y-high-contrast-light', 'github-dark'
nb_execution_mode, nb_render_markdown_format, nb_merge_streams, nb_output_stderr = (
    'off',
    'myst',
    True,
    'show',
)
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_block', 'attrs_inline']
myst_all_links_external = True  # build.py has made every link relative to its page
myst_dmath_double_inline = True
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']
add_module_names, highlight_language = False, 'text'  # a block without a language is a command
toc_object_entries_show_parents = 'hide'


def about(app):
    return json.loads((ROOT / '_proc' / '_sphinx.json').read_text(encoding='utf-8'))


def linkcode_resolve(domain, info):
    "A name's source at the repository's home, as nbdev links it."
    from nbdev.doclinks import NbdevLookup

    lookup = NbdevLookup()
    found = lookup[info['fullname']]
    return (
        lookup.code(info['fullname'])
        if isinstance(found, tuple) and found[1] == info['module'].replace('.', '/') + '.py'
        else None
    )


def anchors(app, doctree):
    "nbdev's anchors: a name in small letters. Short cells of tables stay on one line. Runs are in no sidebar, and the search finds them by the list of runs."
    from docutils.nodes import entry
    from sphinx.addnodes import desc_signature

    for cell in doctree.findall(entry):
        n = len(cell.astext())
        cell['classes'] += ['short'] * (n <= 26) + ['tiny'] * (n <= 14) + ['long'] * (n > 60)
    for sig in doctree.findall(desc_signature):
        if (name := sig.get('fullname', '').lower()) and name not in sig['ids']:
            sig['ids'].append(name)
    if app.site.get(app.env.docname, {}).get('run'):
        app.env.metadata[app.env.docname] |= dict(orphan=True, nosearch=True)


def context(app, pagename, templatename, context, doctree):
    "What the templates know of a page."
    page = app.site.get(pagename, {})
    context['page'] = page
    if page.get('description'):
        context['metatags'] = (
            context.get('metatags', '')
            + f'<meta name="description" content="{escape(page["description"])}">'
        )


def outputs_folder(app):
    "Pictures on their way from the notebooks to the site; MyST-NB would put them beside _docs."
    app.env.mystnb_config = app.env.mystnb_config.copy(
        output_folder=str(ROOT / '_proc' / '_outputs')
    )


def setup(app):
    app.site = about(app)
    app.connect('builder-inited', outputs_folder, priority=900)
    app.connect('doctree-read', anchors)
    app.connect('html-page-context', context)
