"""README.md is nbs/index.ipynb as Markdown, its pictures beside the notebook.

Without arguments: fail if they differ; with --write: make them.
"""

import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config


def exported():
    "The notebook as nbconvert's Markdown, without hidden cells, and its pictures by name."
    remove = dict(patterns=[r'#\|\s*hide'], enabled=True)
    exporter = dict(preprocessors=['nbconvert.preprocessors.RegexRemovePreprocessor'])
    config = Config(dict(RegexRemovePreprocessor=remove, MarkdownExporter=exporter))
    nb = nbformat.read('nbs/index.ipynb', 4)
    nb.metadata['language_info'] = {'name': 'python'}
    alts = [m[1] for c in nb.cells for m in re.finditer(r'#\|\s*fig-alt: (.+)', c.source)]
    text, resources = MarkdownExporter(config=config).from_notebook_node(nb)
    return text, alts, resources['outputs']


def made():
    "What each file should hold."
    text, alts, outputs = exported()
    text = re.sub(r'```python\n#\| echo: false.*?```\n', '', text, flags=re.S)
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+\n', '\n', text))
    pictures = {}
    for i, (_, data) in enumerate(sorted(outputs.items())):
        pictures[f'index{i or ""}.png'] = data
    for name, there, alt in zip(pictures, re.findall(r'!\[png\]\(.*?\)', text), alts, strict=True):
        text = text.replace(there, f'![{alt}]({name})')
    text = re.sub(r'\]\((?!https?:|#|/)', '](nbs/', text)  # links are relative to the notebook
    text = text.replace('](nbs/../', '](').strip() + '\n'
    files = {Path('nbs') / name: data for name, data in pictures.items()}
    return {Path('README.md'): text.encode()} | files


if __name__ == '__main__':
    for path, data in made().items():
        if '--write' in sys.argv:
            path.write_bytes(data)
        elif not path.is_file() or path.read_bytes() != data:
            sys.exit(f'{path} is not what nbs/index.ipynb shows: `make readme` makes it')
    print('README.md: as it should be')
