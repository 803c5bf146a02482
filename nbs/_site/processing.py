"""nbdev's own processing, with what documents a name written as MyST.

That is its signature, a table of its arguments and, of a class, its methods.
"""

import ast
import importlib
import inspect
import re
import nbdev.showdoc
from fastcore.docments import docments
from nbdev.processors import FilterDefaults, add_show_docs, insert_warning, mv_exports
from nbdev.showdoc import BasicMarkdownRenderer

PACKAGE = 'fewshotmeta'
LONGEST = 40  # letters of a default value


def plain(text: str) -> str:
    "Write a comment as Markdown: what is no code in backticks means what it says."
    parts = re.split(r'(`[^`]+`)', text)
    escaped = (p if p.startswith('`') else re.sub(r'([*_\[\]<>$|\\{}])', r'\\\1', p) for p in parts)
    return ''.join(escaped)


# signatures


def is_no_type(annotation) -> bool:
    "Say whether an annotation names no type."
    empty = (inspect.Parameter.empty, None, type(None))
    return any(annotation is e for e in empty) or isinstance(annotation, inspect._ParameterKind)


def type_name(annotation) -> str:
    "Write an annotation as one does by hand."
    if is_no_type(annotation):
        return ''
    if annotation is type(print):
        return 'function'
    if isinstance(annotation, str):
        text = annotation
    elif isinstance(annotation, type) and not hasattr(annotation, '__args__'):
        text = annotation.__name__
    else:
        text = str(annotation)
    return re.sub(r'\b(?:[A-Za-z_]\w*\.)+(?=\w)', '', text)


def value_name(value) -> str:
    "Write a default value as one does by hand; an ellipsis where that is no expression."
    named = inspect.isroutine(value) or isinstance(value, type)
    text = value.__name__ if named else repr(value)
    try:
        ast.parse(text, mode='eval')
    except SyntaxError:
        return '...'
    return text if len(text) < LONGEST else '...'


def signature_of(f) -> inspect.Signature:
    "Read a signature; that of nothing where Python has none."
    for evaluated in (True, False):
        try:
            return inspect.signature(f, eval_str=evaluated)
        except Exception:  # whatever an annotation raises when it is evaluated
            pass
    return inspect.Signature()


STARS = {inspect.Parameter.VAR_POSITIONAL: '*', inspect.Parameter.VAR_KEYWORD: '**'}


def stars(f) -> dict[str, str]:
    "Map the arguments that stand for several to the stars before their names."
    read = signature_of(f).parameters.values()
    return {p.name: STARS[p.kind] for p in read if p.kind in STARS}


def shown(parameter, types: bool) -> str:
    "Write a parameter as it stands in a signature."
    named = type_name(parameter.annotation) if types else ''
    text = STARS.get(parameter.kind, '') + parameter.name + (f': {named}' if named else '')
    if parameter.default is parameter.empty:
        return text
    return f'{text}{" = " if named else "="}{value_name(parameter.default)}'


def signature(name: str, f, types: bool) -> str:
    "Write a signature in one line: `name(a, *, b=1) -> list`."
    read = signature_of(f)
    found = [p for p in read.parameters.values() if p.name not in ('self', 'cls')]
    parts = [shown(p, types) for p in found]
    kinds = [p.kind for p in found]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        parts.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), '*')
    returned = '' if inspect.isclass(f) else type_name(read.return_annotation)
    return f'{name}({", ".join(parts)})' + (f' -> {returned}' if returned else '')


# arguments


def module_of(symbol) -> str:
    "Name the module that defines a symbol, also where a notebook has it from a cell of its own."
    own = getattr(symbol, '__module__', None) or ''
    return own if own.startswith(PACKAGE) else Documented.home


def on_disk(f):
    """Find a class as its module defines it.

    The fields' comments stand in a file, not in a notebook's memory, and there it has the methods
    that later cells give it.
    """
    module = module_of(f)
    if not inspect.isclass(f) or not module:
        return f
    return getattr(importlib.import_module(module), f.__name__, f)


def rows(f) -> list[tuple[str, str, str]]:
    """List name, type and comment of each argument that has any, and of what is returned.

    Where no argument has a comment, the signature says it all: the list is empty.
    """
    try:
        found = docments(on_disk(f), full=True, args_kwargs=True)
    except Exception:  # docments reads source, of which there may be none
        return []
    kept = {name: told for name, told in found.items() if name not in ('self', 'return')}
    returned = found.get('return', {})
    if not isinstance(f, type) and returned.get('docment'):
        kept['returns'] = returned
    starred = stars(on_disk(f))
    out = [
        (starred.get(k, '') + k, type_name(v.get('anno')), v.get('docment') or '')
        for k, v in kept.items()
    ]
    commented = any(comment for _, _, comment in out)
    return [row for row in out if row[1] or row[2]] if commented else []


def type_code(name: str) -> str:
    return '`' + name.replace('|', r'\|') + '`' if name else ''


def table(rows) -> str:
    "Write the table of arguments, with a column of types where there are any."
    if not rows:
        return ''
    typed = any(type_name for _, type_name, _ in rows)
    lines = [['argument', 'type', 'meaning'], ['---'] * 3]
    for name, type_name, comment in rows:
        name = '*returns*' if name == 'returns' else f'**{plain(name)}**'
        lines.append([name, type_code(type_name), ' '.join(plain(comment).split())])
    if not typed:
        lines = [[name, comment] for name, _, comment in lines]
    return '{.arguments}\n' + ''.join(f'| {" | ".join(line)} |\n' for line in lines)


# blocks


def block(kind, name, f, doc, inner='', fence=':::', module='') -> str:
    "Write a directive of Sphinx's Python domain."
    found = rows(f)
    head = name if kind == 'property' else signature(name, f, types=not found)
    options = f':module: {module}\n' if module else ''
    parts = [
        f'{fence}{{py:{kind}}} {head}\n{options}',
        plain(doc or ''),
        table(found),
        inner,
        fence,
    ]
    return '\n'.join(parts[:2]) + '\n\n' + '\n'.join(parts[2:]) + '\n'


def function_of(value):
    "Find the function inside a property, class method or static method."
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, (classmethod, staticmethod)) else value


def described(cls) -> dict:
    "Map the public methods and properties that a class defines and describes itself."
    out = {}
    for name, value in vars(cls).items():
        f = function_of(value)
        if not name.startswith('_') and inspect.isfunction(f) and f.__doc__:
            out[name] = value
    return out


def is_patched(cls, value) -> bool:
    "Whether `@patch` gave this class a member, which then has a description of its own."
    f = inspect.unwrap(function_of(value))
    home = f.__qualname__.split('.')[-2:-1]  # another class's method may be borrowed
    return f.__qualname__ != f.__code__.co_qualname and home == [cls.__name__]


def members(cls) -> str:
    "Write what a class's body defines, and list what `@patch` gives it below."
    own = {name: value for name, value in described(cls).items() if not is_patched(cls, value)}
    out = []
    for name, value in own.items():
        kind = 'property' if isinstance(value, property) else 'method'
        f = function_of(value)
        out.append(block(kind, name, f, inspect.getdoc(f)))
    later = [name for name in described(on_disk(cls)) if name not in own]
    if later:
        links = [f'[{name}](#{cls.__name__.lower()}.{name.lower()})' for name in later]
        out.append(f'Told below: {", ".join(links)}.\n')
    return '\n'.join(out)


def kind_of(symbol, name: str) -> str:
    "Name the directive that describes a symbol."
    if inspect.isclass(symbol):
        return 'class'
    if isinstance(symbol, property):
        return 'property'
    return 'method' if '.' in name else 'function'


class Documented(BasicMarkdownRenderer):
    "What `show_doc` shows in the site."

    home = ''  # the module that the notebook at work exports

    def __init__(self, sym, name=None, **options):
        # before it is unwrapped: a decorated method given by `@patch` has its class's name outside
        name = name or getattr(function_of(sym), '__qualname__', None)
        super().__init__(sym, name=name, **options)
        self.kind = kind_of(sym, self.nm)

    def _repr_markdown_(self):
        inner = members(self.sym) if self.kind == 'class' else ''
        module = module_of(self.sym)
        return block(self.kind, self.nm, self.sym, self.docs, inner, fence='::::::', module=module)


# processors


def home_of(nb) -> str:
    "Name the module that a notebook exports; '' where it exports none."
    found = (re.search(r'^#\|\s*default_exp\s+(\S+)', cell.source, re.M) for cell in nb.cells)
    names = [PACKAGE + '.' + match[1] for match in found if match]
    return names[0] if names else ''


def documented_after(cells, i: int) -> int:
    "Count on from a cell over the blocks that document names: the first cell that is none."
    while i < len(cells) and getattr(cells[i], 'has_sd', False):
        i += 1
    return i


class shown_in_order(add_show_docs):
    "nbdev's step, with the names of a cell in the cell's order."

    def begin(self):
        super().begin()
        cells, i = self.nb.cells, 0
        while i < len(cells):
            j = documented_after(cells, i)
            cells[i:j] = cells[i:j][::-1]
            i = max(j, i + 1)


class source_after_docs(mv_exports):
    "nbdev's step, for cells that define several names."

    def begin(self):
        cells = self.nb.cells
        for i in reversed(range(len(cells))):
            if cells[i].cell_type == 'code' and 'exports' in cells[i].directives_:
                j = documented_after(cells, i + 1)
                cells.insert(j - 1, cells.pop(i))


class SiteFilter(FilterDefaults):
    "nbdev's processors for our site."

    def base_procs(self):
        ours = {add_show_docs: shown_in_order, mv_exports: source_after_docs}
        return [ours.get(p, p) for p in super().base_procs() if p is not insert_warning]

    def __call__(self, nb):
        nbdev.showdoc.BasicMarkdownRenderer = Documented
        Documented.home = home_of(nb)
        return super().__call__(nb)
