"""The text of notebooks: its links, its callouts, its plain words."""

import re
import yaml
from pages import Page

CALLOUTS = {'note', 'tip', 'warning', 'caution', 'important'}
FENCE = re.compile(r'^(\s*(?:```|~~~))')


def outside_code(text: str, change) -> str:
    "Pass what is no code in Markdown through a function."
    out, prose, fence = [], [], None

    def flush():
        for part in re.split(r'(`+[^`]+`+)', ''.join(prose)):
            out.append(part if part.startswith('`') else change(part))
        prose.clear()

    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if fence is None and not mark:
            prose.append(line)
            continue
        flush()
        out.append(line)
        if mark:
            found = mark[1].strip()
            fence = None if fence == found else fence or found
    flush()
    return ''.join(out)


def relinked(text: str, page: Page, links) -> str:
    "Make a text's links lead to pages of the site."

    def led_on(found):
        return f']({links(found[1], page)})'

    return outside_code(text, lambda prose: re.sub(r'\]\(([^)\s]+)\)', led_on, prose))


def front_matter(text: str) -> dict:
    "Read the YAML between two lines of dashes."
    found = re.match(r'---\n(.*?)\n---', text.strip(), re.S)
    return yaml.safe_load(found[1]) if found else {}


def callouts(text: str) -> str:
    "Write Quarto's callouts as admonitions."

    def opened(found):
        colons, kind, rest = found.groups()
        kind = kind if kind in CALLOUTS else 'note'
        title = re.search(r'title="([^"]*)"', rest)
        if title:
            return f'{colons}{{admonition}} {title[1]}\n:class: {kind}'
        return f'{colons}{{{kind}}}'

    return re.sub(r'^(:{3,})\s*\{\.callout-(\w+)([^}]*)\}\s*$', opened, text, flags=re.M)


def without_comments(text: str) -> str:
    "Leave out what stands between `<!--` and `-->`."
    return outside_code(text, lambda prose: re.sub(r'<!--.*?-->', '', prose, flags=re.S))


def markdown(text: str, page: Page, links) -> str:
    "Convert the text of a Markdown cell."
    return relinked(callouts(without_comments(text)), page, links)


def said(text: str) -> str:
    "Say Markdown in plain words."
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', text)
    return ' '.join(re.sub(r'[`*\\{}]|^[>#]+\s*', '', text, flags=re.M).split())


def headings(text: str, last: str) -> str:
    "Find the last heading of a Markdown cell, or keep the one before it."
    prose = re.sub(r'(?s)```.*?```', '', text)
    return (re.findall(r'^#+\s+(.+)$', prose, re.M) or [last])[-1]
