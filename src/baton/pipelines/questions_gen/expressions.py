"""Answers as exact numbers: a small language of sums, read without ever running what was written.

Text comes from a model, so `eval` (and SymPy's own parser, which uses it) is out of the question,
and so are towers of powers that would take a machine down.
"""

from __future__ import annotations

import ast
import re

import sympy

_LONGEST = 200
_LARGEST_EXPONENT = 64
_LARGEST = sympy.Integer(10) ** 60

_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_ROOT = re.compile(r"\\sqrt\{([^{}]*)\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}")
_BOXED = re.compile(r"^\\boxed\{(.*)\}$")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
# A number before a letter or a bracket is multiplied by it.
_PRODUCT = re.compile(r"(?<=[\d)])\s*(?=[a-z(])")
_SIMPLE = (
    (r"\left", ""),
    (r"\right", ""),
    (r"\cdot", "*"),
    (r"\times", "*"),
    (r"\div", "/"),
    (r"\pi", " pi "),
    (r"\,", ""),
    (r"\$", ""),
    ("$", ""),
    ("{", "("),
    ("}", ")"),
    ("^", "**"),
    ("−", "-"),
    ("×", "*"),
    ("·", "*"),
    ("÷", "/"),
    ("π", " pi "),
)


class NotExact(ValueError):
    """A text that is no expression of this language, or too large a one."""


def parse(text: str) -> sympy.Expr:
    """An expression of numbers, one-letter unknowns, `+ - * / ^ sqrt()` and pi, LaTeX or plain.

    Raises:
        NotExact: it is something else, divides by zero, or would be enormous.
    """
    if len(text) > _LONGEST:
        raise NotExact(f"{len(text)} characters")
    plain = _plain(text)
    try:
        tree = ast.parse(plain, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotExact(f"no expression: {plain!r}") from error
    return _value(tree.body)


def _plain(text: str) -> str:
    text = text.strip().rstrip(".").strip()
    text = text.removeprefix("$").removesuffix("$").strip()
    boxed = _BOXED.match(text)
    text = _TEXT.sub("", boxed[1] if boxed else text)
    for _ in range(3):
        text = _FRACTION.sub(r"((\1)/(\2))", text)
        text = _ROOT.sub(r"sqrt(\1)", text)
    for old, new in _SIMPLE:
        text = text.replace(old, new)
    text = _THOUSANDS.sub("", text).strip()
    return _PRODUCT.sub("*", text)


def _value(node: ast.expr) -> sympy.Expr:
    value = _raw(node)
    if value.has(sympy.zoo, sympy.nan, sympy.oo):
        raise NotExact("divides by zero")
    if value.is_number and value.is_Rational and abs(value) > _LARGEST:
        raise NotExact("too large")
    return value


def _raw(node: ast.expr) -> sympy.Expr:
    match node:
        case ast.Constant(value=bool()):
            raise NotExact("a truth value")
        case ast.Constant(value=int() as number):
            return sympy.Integer(number)
        case ast.Constant(value=float() as number):
            # As written: 0.1 is a tenth.
            return sympy.Rational(str(number))
        case ast.Name(id="pi"):
            return sympy.pi
        case ast.Name(id=name) if len(name) == 1 and name.isascii():
            return sympy.Symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value(inner)
        case ast.Call(func=ast.Name(id="sqrt"), args=[inner], keywords=[]):
            return sympy.sqrt(_value(inner))
        case ast.BinOp(left=left, op=op, right=right):
            return _combined(_value(left), op, _value(right))
    raise NotExact(f"{type(node).__name__} is not arithmetic")


def _combined(left: sympy.Expr, op: ast.operator, right: sympy.Expr) -> sympy.Expr:
    match op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow() if right.is_Integer and abs(right) <= _LARGEST_EXPONENT:
            if left.is_Rational and abs(left) > 1 and abs(left) ** abs(right) > _LARGEST:
                raise NotExact("too large")
            return left**right
        case ast.Pow() if right.is_Rational and abs(right) <= _LARGEST_EXPONENT and right.q <= 6:
            return left**right
    raise NotExact(f"{type(op).__name__} of these is not computed")
