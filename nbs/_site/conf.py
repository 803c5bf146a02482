"""Sphinx's configuration of the site; build.py calls it."""

import base64
import hashlib
import json
import re
import sys
from html import escape
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pages import ROOT, settings, site_address
from safety import size_classes

_settings = settings()
project = _settings['title']
author = _settings['author']
copyright = f'2026 onwards, {author}'
language = 'en'

extensions = ['myst_nb', 'sphinx.ext.linkcode', 'sphinx.ext.githubpages', 'mathml']
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type']

# the look
html_theme = 'furo'
html_title = project
html_baseurl = site_address()
html_static_path = ['static']
templates_path = ['templates']
html_css_files = ['site.css']
html_js_files = ['site.js']
html_favicon = html_logo = 'static/favicon.svg'
html_show_sourcelink = html_copy_source = html_use_index = False
html_math_renderer = 'mathml'
pygments_style = 'a11y-high-contrast-light'
pygments_dark_style = 'github-dark'
highlight_language = 'text'  # a block without a language is a command

# notebooks: nothing is executed
nb_execution_mode = 'off'
nb_code_prompt_show = nb_code_prompt_hide = 'Code'
nb_render_markdown_format = 'myst'
nb_merge_streams = True
nb_output_stderr = 'show'
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'attrs_block', 'attrs_inline']
myst_all_links_external = True  # build.py has made every link relative to its page
myst_dmath_double_inline = True

# names
add_module_names = False
toc_object_entries_show_parents = 'hide'


def about(app):
    "Read what build.py knows of each page."
    return json.loads((ROOT / '_proc' / '_sphinx.json').read_text(encoding='utf-8'))


def linkcode_resolve(domain, info):
    "Give a name's source at the repository's home, as nbdev links it; None where none is known."
    from nbdev.doclinks import NbdevLookup, _get_exps

    if not _settings['git_url']:
        return None
    found = NbdevLookup()[f'{info["module"]}.{info["fullname"]}']
    if not isinstance(found, tuple):
        return None
    _, path, address = found
    line = _get_exps(path).get(info['fullname'])
    return f'{address}#L{line}' if line else address


def anchors(app, doctree):
    """Give names nbdev's anchors, in small letters, and table cells their sizes.

    Runs are in no sidebar, and the search finds them by the list of runs.
    """
    from docutils.nodes import entry
    from sphinx.addnodes import desc_signature

    for cell in doctree.findall(entry):
        cell['classes'] += size_classes(cell.astext())
    for signature in doctree.findall(desc_signature):
        name = signature.get('fullname', '').lower()
        if name and name not in signature['ids']:
            signature['ids'].append(name)
    if app.site.get(app.env.docname, {}).get('run'):
        app.env.metadata[app.env.docname] |= dict(orphan=True, nosearch=True)


def theme_scripts() -> str:
    "Name by their digests the scripts that the theme writes into every page."
    theme = Path(find_spec('furo').origin).parent / 'theme' / 'furo' / 'base.html'
    scripts = re.findall('(?s)<script>(.*?)</script>', theme.read_text(encoding='utf-8'))
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return ' '.join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def policy(page: dict) -> str:
    """Say what a page may execute: the theme's scripts, whatever else may have got into it.

    What shows a run asks no other machine either. A notebook of nbs/ whose own outputs bring
    scripts, say a plot to turn, keeps them.
    """
    if page.get('scripts'):
        return ''
    rules = [f"script-src 'self' {theme_scripts()}", "object-src 'none'", "base-uri 'none'"]
    if page.get('shows_runs'):
        here = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
        rules += [here, "form-action 'self'"]
    return '; '.join(rules)


def same_sidebar(app, pagename, make):
    """Make the sidebar of a run once for all runs in folders of its depth.

    A sidebar takes as long as the rest of a page, and no run is in it.
    """

    def sidebar(**options):
        key = pagename.count('/'), *sorted(options.items())
        if key not in app.sidebars:
            app.sidebars[key] = make(**options)
        return app.sidebars[key]

    return sidebar


def context(app, pagename, templatename, context, doctree):
    "Tell the templates what they know of a page."
    page = app.site.get(pagename, {})
    if page.get('run'):
        context['toctree'] = same_sidebar(app, pagename, context['toctree'])
    context['page'] = page
    if rules := policy(page):
        tag = f'<meta http-equiv="Content-Security-Policy" content="{escape(rules)}">'
        context['metatags'] = tag + context.get('metatags', '')
    if words := page.get('description'):
        tag = f'<meta name="description" content="{escape(words)}">'
        context['metatags'] = context.get('metatags', '') + tag


def outputs_folder(app):
    "Put pictures on their way from the notebooks where MyST-NB does not: not beside _docs."
    folder = ROOT / '_proc' / '_outputs'
    app.env.mystnb_config = app.env.mystnb_config.copy(output_folder=str(folder))


def setup(app):
    app.site = about(app)
    app.sidebars = {}
    app.connect('builder-inited', outputs_folder, priority=900)
    app.connect('doctree-read', anchors)
    app.connect('html-page-context', context, priority=400)  # the theme takes what we give it
