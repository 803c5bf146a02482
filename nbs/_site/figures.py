"""What a picture shows: in words, for those who do not see it, and whether it is a plot."""

import ast
import base64
import functools
import io
import re
import numpy as np
from PIL import Image
from pages import ROOT
from prose import said

LONGEST = 300  # letters of a description
WHITE, DARK = 250, 90  # of 255: a plot's ground, and its axes
GROUND = 0.4  # a plot's share of white, at least
COMMON, SHADES = 12, 0.15  # colours, and the largest share of what has none of them
AXIS = 0.15  # the length of an axis, of the picture's width or height, at least


def call_of(owner: str, function: str) -> str:
    "Write the pattern of a call in a cell: a method's object mostly bears its class's name."
    if not owner:
        return function
    name = owner.lower()
    return rf'(?:{name}|result)\.{function}' if owner == 'Evaluation' else rf'{name}\.{function}'


def owners(tree) -> dict:
    "Map each method to its class: the one that it stands in, or that `@patch` gives it to."
    out = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            out.update({child: node.name for child in node.body})
        elif isinstance(node, ast.FunctionDef) and 'patch' in map(decorator, node.decorator_list):
            out[node] = ast.unparse(node.args.args[0].annotation)
    return out


def decorator(node) -> str:
    "Name a decorator, called or not."
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


@functools.cache
def drawing() -> dict:
    "Map the calls of the package's functions that draw to what their docstrings say they draw."
    out = {}
    for path in sorted((ROOT / 'fewshotmeta').rglob('*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        inside = owners(tree)
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            doc = ast.get_docstring(node) or ''
            if doc.startswith('Draw '):
                words = said(doc.removeprefix('Draw ').split('. ')[0])
                out[call_of(inside.get(node, ''), node.name)] = words.rstrip('.')
    return out


def leading_sentence(before: str) -> str:
    """Find the sentence that leads to a picture.

    That is the last one before it if that ends in a colon, or the first of its paragraph.
    """
    prose = re.sub(r'(?s)```.*?```|\$\$.*?\$\$', '', before)
    blocks = [block for block in re.split(r'\n\s*\n', prose) if block.strip()]
    blocks = [block for block in blocks if not block.lstrip().startswith(('|', '#', '- '))]
    if not blocks:
        return ''
    sentences = re.split(r'(?<=[.:?!])\s+(?=[A-Z*`])', said(blocks[-1]))
    chosen = sentences[-1] if sentences[-1].endswith(':') else sentences[0]
    return '' if '$' in chosen else chosen.rstrip(':')


def axis_label(axis: str, source: str) -> str:
    "Read what a cell writes along an axis."
    found = re.search(rf'{axis}label[=(]\s*[\'"]([^\'"{{}}]+)[\'"]', source)
    return found[1].replace('\\n', ' ') if found else ''


def alt_text(source: str, before: str, heading: str, directive: str = '') -> str:
    """Describe a picture.

    What its cell says (`#| fig-alt: …`), or its axes or the function that draws it, followed by
    the sentence that leads to it.
    """
    if directive:
        return directive
    heading = said(heading)
    axes = ' against '.join(filter(None, (axis_label('y', source), axis_label('x', source))))
    calls = (words for call, words in drawing().items() if re.search(rf'\b{call}\(', source))
    drawn = axes or next(calls, '')
    leading = leading_sentence(before) or (heading if drawn else '')
    parts = [drawn or f'Figure: {heading}', leading]
    text = '. '.join(part.rstrip('.') for part in parts if part)
    return text if len(text) <= LONGEST else text[:LONGEST].rpartition(' ')[0] + ' …'


# plots


def pixels(png: str) -> np.ndarray:
    "Read a PNG, in base64, on a white ground: (height, width, 3), 0 to 255."
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert('RGBA')
    ground = Image.new('RGBA', image.size, 'white')
    return np.asarray(Image.alpha_composite(ground, image).convert('RGB'))


def longest_run(marked: np.ndarray) -> int:
    "Give the length of the longest row of marked pixels: (height, width), bool."
    length, longest = np.zeros(len(marked), int), 0
    for column in marked.T:
        length = (length + 1) * column
        longest = max(longest, int(length.max()))
    return longest


def shades(image: np.ndarray) -> float:
    "Give the share of pixels that have none of a picture's few common colours, to 32 levels each."
    coarse = (image >> 3).astype(int)
    index = (coarse[..., 0] << 10) + (coarse[..., 1] << 5) + coarse[..., 2]
    counts = np.sort(np.bincount(index.ravel()))
    return 1 - counts[-COMMON:].sum() / index.size


def is_plot(png: str) -> bool:
    """Say whether a picture is a plot, whose lightness a dark page may turn round.

    A plot is mostly white, has few colours and long straight dark lines, its axes. Photographs and
    heat maps have many colours; drawn characters have no axes.
    """
    image = pixels(png)
    if (image.min(-1) >= WHITE).mean() < GROUND or shades(image) > SHADES:
        return False
    dark = image.max(-1) < DARK
    height, width = dark.shape
    return longest_run(dark) > AXIS * width and longest_run(dark.T) > AXIS * height
