"""TeX to MathML when the site is built.

It is latex2mathml's result, corrected where browsers' MathML (Core) or TeX's spacing differ.
"""

import html
import re
import unicodedata
from xml.etree import ElementTree as ET
from latex2mathml.converter import convert_to_element

LETTERS = {
    'script': 'SCRIPT',
    'double-struck': 'DOUBLE-STRUCK',
    'bold': 'BOLD',
    'fraktur': 'FRAKTUR',
}
LIMITS = {'min', 'max', 'sup', 'inf', 'lim'}  # take what stands below them, below
OPENING = {
    '(',
    '[',
    '{',
    '⟨',
    ',',
    '=',
    '<',
    '>',
    '←',
    '→',
    '∝',
    '/',
}  # what follows is no operand's
CLOSING = {')', ']', '}', '⟩'}
SYMBOLS = {'′', '∞', '∂', '∇', '…', '⋯'}  # no operators, whatever Unicode says
FUNCTIONS = {'log', 'ln', 'exp', 'sin', 'cos', 'tan', 'tanh', 'dim', 'det', 'ker', 'gcd', 'deg'}
FENCES = '⟨⟩‖|'
REWRITTEN = (
    (r'\\(begin|end){aligned}', r'\\\1{split}'),
    (r'\\arg(?![a-zA-Z])', r'\\operatorname{arg}'),
)


def mathml(tex: str, block: bool = False) -> str:
    "Write an equation as MathML. Raises `ValueError` for TeX that it does not understand."
    source = tex.strip()
    depth = re.sub(r'\\[{}\\]', '', source)
    if depth.count('{') != depth.count('}'):
        raise ValueError(f'unbalanced braces in the equation {source!r}')
    root = _parsed(source, 'block' if block else 'inline')
    for element in root.iter():
        element.text = html.unescape(element.text) if element.text else None
    for element in root.iter():
        _letter(element)
        _operator(element)
        _space(element)
        _table(element)
    for element in root.iter():
        _arrange(element)
    unknown = [element.text for element in root.iter() if '\\' in (element.text or '')]
    if unknown:
        raise ValueError(
            f'no {unknown[0]} in the equation {source!r}: latex2mathml does not know this command'
        )
    return ET.tostring(root, encoding='unicode')


def _parsed(source: str, display: str):
    "Let latex2mathml read an equation."
    rewritten = source
    for pattern, new in REWRITTEN:
        rewritten = re.sub(pattern, new, rewritten)
    try:
        return convert_to_element(rewritten, display=display)
    except Exception as e:
        kind = type(e).__name__
        raise ValueError(f'latex2mathml cannot read the equation {source!r}: {kind}') from e


def _arrange(parent):
    "Settle what children mean to each other."
    for before, element, after in zip([None, *parent], parent, [*parent[1:], None]):
        if element.tag in ('msub', 'munder') and len(element):
            named = element[0]
            if named.tag == 'mo' and named.text in LIMITS:
                element.tag = 'munder'
                named.set('movablelimits', 'true')
        _beside(before, element, after)


def _beside(before, element, after):
    """Take from an operator's neighbours how much space it has.

    A sign is no difference, and a function stands close to its bracket.
    """
    opened = before is None or before.tag == 'mo' and before.text in OPENING
    closed = after is not None and after.tag == 'mo' and after.text in CLOSING
    text = element.text
    if element.tag == 'mo' and text in ('−', '+', '±') and opened:
        element.set('form', 'prefix')
    if element.tag == 'mo' and text in ('·', '∗') and before is not None and opened and closed:
        _spaced(element, '0', '0')
    if element.tag == 'mi' and text in FUNCTIONS:
        bracket = after is not None and after.text in ('(', '[')
        left = '0' if opened else '0.17em'
        right = '0' if bracket else '0.17em'
        element.tag = 'mo'
        _spaced(element, left, right)


def _spaced(element, left: str, right: str):
    element.set('lspace', left)
    element.set('rspace', right)


def _letter(element):
    """Write the letters of an alphabet: browsers know them, not the attribute that asks for it.

    Capital Greek letters stand upright, as in TeX.
    """
    variant = element.attrib.pop('mathvariant', None)
    text = element.text or ''
    if variant == 'normal' or element.tag == 'mi' and re.fullmatch('[Α-Ω]', text):
        element.set('mathvariant', 'normal')
    elif variant in LETTERS and text:
        element.text = ''.join(_styled(letter, LETTERS[variant]) for letter in text)


def _styled(letter: str, style: str) -> str:
    "Find ℒ for L."
    kind = 'CAPITAL' if letter.isupper() else 'SMALL'
    name = f'{style} {kind} {letter.upper()}'
    for full in (f'MATHEMATICAL {name}', name):
        try:
            return unicodedata.lookup(full)
        except KeyError:
            pass
    return letter


def _is_sign(text: str) -> bool:
    "Say whether a text is a symbol or punctuation that operates on something."
    if not text or text.isalnum() or text in SYMBOLS:
        return False
    return unicodedata.category(text[0])[0] in 'SP'


def _operator(element):
    "Make operators operators."
    text = element.text or ''
    if element.tag == 'mi' and _is_sign(text):
        element.tag = 'mo'
    if element.tag in ('mi', 'mo') and text == '*':
        element.tag, element.text = 'mo', '∗'
    if element.tag == 'mover' and len(element) > 1 and element[1].text == '¯':
        element.set('accent', 'true')
        element[1].set('stretchy', 'false')
    if element.tag == 'mtext':
        element.text = text.replace(' ', '\u00a0')
    if element.tag in ('mi', 'mo') and set(text) == {'′'}:
        element.set('class', 'prime')


def _space(element):
    "Give named operators a thin space, and fences none."
    text = element.text or ''
    if element.tag != 'mo' or not text:
        return
    if text in '/()[]' + FENCES:
        _spaced(element, '0', '0')
    if text in FENCES:
        element.set('stretchy', 'true' if element.get('minsize') else 'false')
    if text.isalpha() and len(text) > 1:
        _spaced(element, '0.12em', '0.12em' if text in LIMITS or text == 'arg' else '0')


def _table(element):
    "Align columns by style; MathML Core has no attribute for it."
    if element.tag == 'mtd' and (side := element.attrib.pop('columnalign', None)):
        element.set('style', f'text-align: {side}')
    if element.tag == 'mtable':
        for name in ('columnspacing', 'rowspacing', 'columnalign'):
            element.attrib.pop(name, None)
        element.set('displaystyle', 'true')


def setup(app):
    "Give Sphinx the renderer: an equation that cannot be drawn stops the build, with its page."
    from docutils.nodes import SkipNode
    from sphinx.errors import ExtensionError

    def drawn(translator, node, block):
        try:
            return mathml(node.astext(), block)
        except ValueError as e:
            raise ExtensionError(f'{translator.builder.current_docname}: {e}') from e

    def inline(translator, node):
        translator.body.append(drawn(translator, node, False))
        raise SkipNode

    def block(translator, node):
        equation = drawn(translator, node, True)
        translator.body.append(f'<div class="equation" tabindex="0">{equation}</div>\n')
        raise SkipNode

    app.add_html_math_renderer('mathml', (inline, None), (block, None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
