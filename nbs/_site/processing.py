"""nbdev's own processing, with the documentation of a name written as MyST: signature, a table of arguments, methods."""

import ast, importlib, inspect, re
import nbdev.showdoc
from fastcore.docments import docments
from nbdev.processors import FilterDefaults, add_show_docs, insert_warning, mv_exports
from nbdev.showdoc import BasicMarkdownRenderer


def plain(text: str) -> str:
    "A comment as Markdown: what is no code in backticks means what it says."
    parts = re.split(r'(`[^`]+`)', text)
    return ''.join(
        p if p.startswith('`') else re.sub(r'([*_\[\]<>$|\\{}])', r'\\\1', p) for p in parts
    )


def type_name(anno) -> str:
    "An annotation as one writes it."
    if (
        anno is inspect.Parameter.empty
        or anno is None
        or anno is type(None)
        or isinstance(anno, inspect._ParameterKind)
    ):
        return ''
    if anno is type(print):
        return 'function'
    text = (
        anno
        if isinstance(anno, str)
        else anno.__name__
        if isinstance(anno, type) and not hasattr(anno, '__args__')
        else str(anno)
    )
    return re.sub(r'\b(?:[A-Za-z_]\w*\.)+(?=\w)', '', text)


def value_name(value) -> str:
    "A default value as one writes it; an ellipsis where that is no expression."
    text = value.__name__ if inspect.isroutine(value) or isinstance(value, type) else repr(value)
    try:
        ast.parse(text, mode='eval')
    except SyntaxError:
        return '...'
    return text if len(text) < 40 else '...'


def parameters(f):
    "The parameters of a function or class, without self."
    try:
        found = inspect.signature(f, eval_str=True)
    except Exception:
        try:
            found = inspect.signature(f)
        except (ValueError, TypeError):
            return [], inspect.Parameter.empty
    return [
        p for p in found.parameters.values() if p.name not in ('self', 'cls')
    ], found.return_annotation


def shown(p, types: bool) -> str:
    "A parameter in a signature."
    stars = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
    anno = f': {type_name(p.annotation)}' if types and type_name(p.annotation) else ''
    return f'{stars}{p.name}{anno}' + (
        '' if p.default is p.empty else f'{" = " if anno else "="}{value_name(p.default)}'
    )


def signature(name, f, types: bool) -> str:
    "One line: `name(a, *, b=1) -> list`."
    found, returns = parameters(f)
    parts = [shown(p, types) for p in found]
    alone = next((i for i, p in enumerate(found) if p.kind is p.KEYWORD_ONLY), None)
    if alone is not None and not any(p.kind is p.VAR_POSITIONAL for p in found):
        parts.insert(alone, '*')
    return f'{name}({", ".join(parts)})' + (
        f' -> {type_name(returns)}' if type_name(returns) and not inspect.isclass(f) else ''
    )


def on_disk(f):
    "A class as its module defines it: the fields' comments stand in a file, not in a notebook's memory."
    if not inspect.isclass(f) or not isinstance(
        found := nbdev.showdoc.NbdevLookup()[f.__name__], tuple
    ):
        return f
    return getattr(
        importlib.import_module(found[1].removesuffix('.py').replace('/', '.')), f.__name__, f
    )


def rows(f):
    "Name, type and comment of each argument that has any, and of what is returned; nothing if no comment is among them."
    try:
        found = docments(on_disk(f), full=True)
    except Exception:
        return []
    kept = [(k, v) for k, v in found.items() if k not in ('self', 'return')]
    if isinstance(f, type) is False and found.get('return', {}).get('docment'):
        kept.append(('returns', found['return']))
    said = [(k, type_name(v.get('anno')), v.get('docment') or '') for k, v in kept]
    return [r for r in said if r[1] or r[2]] if any(r[2] for r in said) else []


def table(rows) -> str:
    "The table of arguments."
    if not rows:
        return ''
    typed = any(t for _, t, _ in rows)

    def line(cells):
        return '| ' + ' | '.join(cells) + ' |\n'

    def code(t):
        return '`' + t.replace('|', r'\|') + '`' if t else ''

    body = ''.join(
        line(
            [
                f'*{k}*' if k == 'returns' else f'**{plain(k)}**',
                *([code(t)] if typed else []),
                ' '.join(plain(d).split()),
            ]
        )
        for k, t, d in rows
    )
    head = ['argument', *(['type'] if typed else []), 'meaning']
    return '{.arguments}\n' + line(head) + line(['---'] * len(head)) + body


def block(kind, name, f, doc, inner='', fence=':::', module='') -> str:
    "A directive of Sphinx's Python domain."
    found = rows(f)
    head = name if kind == 'property' else signature(name, f, types=not found)
    options = f':module: {module}\n' if module else ''
    return f'{fence}{{py:{kind}}} {head}\n{options}\n{plain(doc)}\n\n{table(found)}\n{inner}\n{fence}\n'


def members(cls) -> str:
    "The methods and properties that a class defines and describes itself."
    out = []
    for name, value in vars(cls).items():
        f = (
            value.fget
            if isinstance(value, property)
            else value.__func__
            if isinstance(value, (classmethod, staticmethod))
            else value
        )
        if name.startswith('_') or not inspect.isfunction(f) or not f.__doc__:
            continue
        out.append(
            block(
                'property' if isinstance(value, property) else 'method', name, f, inspect.getdoc(f)
            )
        )
    return '\n'.join(out)


class Documented(BasicMarkdownRenderer):
    "What `show_doc` shows in the site."

    def _repr_markdown_(self):
        found = nbdev.showdoc.NbdevLookup()[self.fn]
        module = found[1].removesuffix('.py').replace('/', '.') if isinstance(found, tuple) else ''
        is_class = inspect.isclass(self.sym)
        kind = 'class' if is_class else 'method' if '.' in self.nm else 'function'
        return block(
            kind,
            self.nm,
            self.sym,
            self.docs,
            members(self.sym) if is_class else '',
            fence='::::::',
            module=module,
        )


class shown_in_order(add_show_docs):
    "nbdev's step, with the names of a cell in the cell's order."

    def begin(self):
        super().begin()
        cells, i = self.nb.cells, 0
        while i < len(cells):
            j = i
            while j < len(cells) and getattr(cells[j], 'has_sd', False):
                j += 1
            cells[i:j] = cells[i:j][::-1]
            i = max(j, i + 1)


class source_after_docs(mv_exports):
    "nbdev's step, for cells that define several names."

    def begin(self):
        cells = self.nb.cells
        for i in reversed(range(len(cells))):
            if cells[i].cell_type != 'code' or 'exports' not in cells[i].directives_:
                continue
            j = i + 1
            while j < len(cells) and getattr(cells[j], 'has_sd', False):
                j += 1
            cells.insert(j - 1, cells.pop(i))


class SiteFilter(FilterDefaults):
    "nbdev's processors for our site."

    def base_procs(self):
        ours = {add_show_docs: shown_in_order, mv_exports: source_after_docs}
        return [ours.get(p, p) for p in super().base_procs() if p is not insert_warning]

    def __call__(self, nb):
        nbdev.showdoc.BasicMarkdownRenderer = Documented
        return super().__call__(nb)
