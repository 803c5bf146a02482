"""README.md is nbs/index.ipynb as Markdown. Without arguments: fail if they differ; --write: make it."""
import re, sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

def made():
    config = Config({'RegexRemovePreprocessor': {'patterns': [r'#\|\s*hide'], 'enabled': True}, 'MarkdownExporter': {'preprocessors': ['nbconvert.preprocessors.RegexRemovePreprocessor']}})
    nb = nbformat.read('nbs/index.ipynb', 4)
    nb.metadata['language_info'] = {'name': 'python'}
    text, _ = MarkdownExporter(config=config).from_notebook_node(nb)
    text = re.sub(r'```python\n#\| echo: false.*?```\n', '', text, flags=re.S)
    text = re.sub(r'\n{3,}', '\n\n', text)
    text = re.sub(r'\]\((?!https?:|#|/)', '](nbs/', text)          # links are relative to the notebook
    return text.replace('](nbs/../', '](').strip() + '\n'

if __name__ == '__main__':
    path = Path('README.md')
    if '--write' in sys.argv: path.write_text(made(), encoding='utf-8')
    elif path.read_text(encoding='utf-8') != made(): sys.exit('README.md is not nbs/index.ipynb as Markdown: `make readme` makes it')
    print('README.md: as it should be')
