"""README.md is nbs/index.ipynb as Markdown, its pictures beside the notebook. Without arguments: fail if they differ; --write: make them."""

import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config


def made():
    "What each file should hold."
    config = Config(
        {
            'RegexRemovePreprocessor': {'patterns': [r'#\|\s*hide'], 'enabled': True},
            'MarkdownExporter': {
                'preprocessors': ['nbconvert.preprocessors.RegexRemovePreprocessor']
            },
        }
    )
    nb = nbformat.read('nbs/index.ipynb', 4)
    nb.metadata['language_info'] = {'name': 'python'}
    alts = [m[1] for c in nb.cells for m in re.finditer(r'#\|\s*fig-alt: (.+)', c.source)]
    text, resources = MarkdownExporter(config=config).from_notebook_node(nb)
    text = re.sub(r'```python\n#\| echo: false.*?```\n', '', text, flags=re.S)
    text = re.sub(r'\n{3,}', '\n\n', re.sub(r'[ \t]+\n', '\n', text))
    pictures = {
        f'index{i or ""}.png': data
        for i, (_, data) in enumerate(sorted(resources['outputs'].items()))
    }
    for name, there, alt in zip(pictures, re.findall(r'!\[png\]\(.*?\)', text), alts, strict=True):
        text = text.replace(there, f'![{alt}]({name})')
    text = re.sub(r'\]\((?!https?:|#|/)', '](nbs/', text)  # links are relative to the notebook
    text = text.replace('](nbs/../', '](').strip() + '\n'
    return {Path('README.md'): text.encode()} | {
        Path('nbs') / name: data for name, data in pictures.items()
    }


if __name__ == '__main__':
    for path, data in made().items():
        if '--write' in sys.argv:
            path.write_bytes(data)
        elif not path.is_file() or path.read_bytes() != data:
            sys.exit(f'{path} is not what nbs/index.ipynb shows: `make readme` makes it')
    print('README.md: as it should be')
