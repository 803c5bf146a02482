"""Small faults of a module, one at a time: a boundary, a condition, a number, a call that is gone.

Docstrings, annotations, decorators, texts, the words of errors and what draws are left alone.
"""

import ast
import copy
from functools import partial

COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COUNTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Add, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
AS_IT_IS = 'as it is'  # a mutant that must survive
TRUE, FALSE = ast.Constant(True), ast.Constant(False)
TYPES = {'int', 'float', 'str', 'bool', 'list', 'dict', 'None'}


def changed(node, **fields):
    "A copy of a node with other fields."
    new = copy.copy(node)
    vars(new).update(fields)
    return new


def without(sequence):
    "The sequence without each of its members."
    return [sequence[:i] + sequence[i + 1 :] for i in range(len(sequence))]


def is_many(node):
    "Whether it may stand at the end of arguments alone."
    return isinstance(node, ast.Starred | ast.GeneratorExp)


def is_union(node):
    "Whether it is a union of types, whose order means nothing."
    leaves = {ast.unparse(n) for n in ast.walk(node) if isinstance(n, ast.Name | ast.Constant)}
    only = all(isinstance(n, ast.BinOp | ast.BitOr | ast.Name | ast.Constant | ast.Load)
               for n in ast.walk(node))  # fmt: skip
    return only and not leaves.isdisjoint(TYPES)


def of_expression(node):
    "What stands in the place of an expression."
    match node:
        case ast.Compare(ops=[op]):
            return [changed(node, ops=[COMPARED[type(op)]()])]
        case ast.BoolOp(op=op, values=values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            fewer = [v[0] if len(v) == 1 else changed(node, values=v) for v in without(values)]
            return [changed(node, op=other), *fewer]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return [operand]
        case ast.Constant(value=bool(value)):
            return [ast.Constant(not value)]
        case ast.Constant(value=int(value) | float(value)):
            return [ast.Constant(value + 1), ast.Constant(value - 1)]
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            swapped = [] if is_union(node) else [changed(node, left=right, right=left)]
            return [left, right, *swapped]
        case ast.BinOp(op=ast.Div(), right=ast.Constant(value=str()) | ast.JoinedStr()):
            return []  # of a path
        case ast.BinOp(op=op) if type(op) in COUNTED:
            return [changed(node, op=COUNTED[type(op)]())]
        case ast.IfExp(body=body, orelse=orelse):
            return [body, orelse]
        case ast.Call(args=[one, two]) if ast.dump(one) != ast.dump(two) and not is_many(two):
            return [changed(node, args=[two, one])]
    return []


def of_statement(node):
    "What stands in the place of a statement."
    match node:
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Break() | ast.Continue():
            return [ast.Pass()]
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) not in ('None', 'False'):
            return [ast.Return(None)]
        case ast.AugAssign(target=target, value=value):
            return [ast.Assign([target], value, lineno=node.lineno), ast.Pass()]
        case ast.If(test=test):
            return [changed(node, test=value) for value in (TRUE, FALSE)]
        case ast.While():
            return [changed(node, test=FALSE)]
    return []


def of_others(node):
    "The same of what is neither: a condition dropped, one exception less."
    match node:
        case ast.comprehension(ifs=ifs):
            return [changed(node, ifs=fewer) for fewer in without(ifs)]
        case ast.ExceptHandler(type=ast.Tuple(elts=elts) as kinds):
            return [changed(node, type=changed(kinds, elts=fewer)) for fewer in without(elts)]
    return []


def is_drawing(node):
    "Whether a function draws."
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return isinstance(node, ast.FunctionDef) and not names.isdisjoint({'plt', 'show_grid'})


def fields_of(node):
    "The fields of a node that are looked into."
    left_alone = {'annotation', 'returns', 'decorator_list'}
    match node:
        case ast.Raise() | ast.Constant() | ast.ImportFrom() | ast.Import():
            return []
        case ast.Call(func=ast.Attribute(value=ast.Name(id='warnings'))):
            return []
        case ast.Assign(targets=[ast.Name(id='__all__')]):
            return []
    return [field for field in node._fields if field not in left_alone and not is_drawing(node)]


def sites(node, statement=None):
    "Every (holder, key, node, statement) under a node: `holder[key]` is the node."
    if isinstance(node, ast.stmt):
        statement = node
    for field in fields_of(node):
        value = getattr(node, field)
        held = enumerate(value) if isinstance(value, list) else [(field, value)]
        for key, child in held:
            if isinstance(child, ast.AST):
                holder = value if isinstance(value, list) else vars(node)
                inner = child if isinstance(child, ast.stmt) else statement
                yield holder, key, child, inner
                yield from sites(child, statement)


def lines_of(statement):
    "The lines whose run shows that a statement is reached: of a function, its body's."
    body = getattr(statement, 'body', None)
    if not body or isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return range(statement.lineno, statement.end_lineno + 1)
    return range(statement.lineno, max(body[0].lineno, statement.lineno + 1))


def said(node):
    "A node in a line, without what stands in it."
    if hasattr(node, 'body') and not isinstance(node, ast.IfExp | ast.Lambda):
        node = changed(node, body=[], orelse=[])
    text = ' '.join(ast.unparse(node).split())
    return text if len(text) <= 70 else f'{text[:69]}…'


def room_file(room):
    return room.replace('.', '/') + '.py'


def owners(tree, above=''):
    "Which function or class each line is in, by its dotted name."
    held = {}
    for node in ast.iter_child_nodes(tree):
        name = above
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = f'{above}.{node.name}'.lstrip('.')
            held |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), name)
        held |= owners(node, name)
    return held


def mutants_of(room, package):
    "Map what a mutant is to its lines and to what makes its source."
    tree = ast.parse((package / room_file(room)).read_text())
    owner = owners(tree)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inside = set().union(*(range(f.lineno, f.end_lineno + 1) for f in functions))
    found = {f'{room}: {AS_IT_IS}': (room, inside, partial(ast.unparse, tree))}
    for holder, key, node, statement in sites(tree):
        kind = {ast.stmt: of_statement, ast.expr: of_expression}
        makes = next((f for base, f in kind.items() if isinstance(node, base)), of_others)
        for new in makes(node):
            place = f'{room} {owner.get(statement.lineno, "top")}'
            name = f'{place}: {said(node)} → {said(new)}'
            while name in found:
                name += ' (again)'
            lines = lines_of(statement) if statement.lineno in inside else inside
            found[name] = room, set(lines), partial(source_of, tree, holder, key, new)
    return found


def source_of(tree, holder, key, new):
    "The source of a mutant."
    old, holder[key] = holder[key], new
    try:
        return ast.unparse(ast.fix_missing_locations(tree))
    finally:
        holder[key] = old
