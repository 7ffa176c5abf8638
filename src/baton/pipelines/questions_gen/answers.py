"""Is the answer of a problem right? Computed where the problem can be read, otherwise unknown."""

from __future__ import annotations

import enum
import functools
import math
import re
from dataclasses import dataclass

import sympy

from baton.pipelines.questions_gen.expressions import NotExact, parse
from baton.pipelines.questions_gen.problem import Problem


class Verdict(enum.Enum):
    """What computing says of an answer."""

    RIGHT = "right"
    WRONG = "wrong"
    MISSING = "missing"
    # The answer is a number, but the problem is none that can be computed here.
    UNKNOWN = "unknown"
    # The answer is no number, so nothing can be said.
    NO_NUMBER = "no number"


_COMPUTE = re.compile(
    r"(?:compute|evaluate|calculate|determine|find|what is)\s+(?:the\s+)?(?:exact\s+)?"
    r"(?:value\s+of\s+|integer\s+|number\s+|sum\s+|product\s+|expression\s+)*"
    r"\$?(?P<sum>[\d(\-−\\](?:[^?,;$]|,(?=\d{3}))*?)\$?\s*(?:[?;]|\.(?!\d)|$)",
    re.IGNORECASE,
)
_DIVISOR = re.compile(
    r"(?:greatest common divisor|gcd)\s*(?:of\s+|\()\$?(\d{1,12})\$?\s*(?:and|,)\s*\$?(\d{1,12})",
    re.IGNORECASE,
)
_MULTIPLE = re.compile(
    r"(?:least common multiple|lcm)\s*(?:of\s+|\()\$?(\d{1,12})\$?\s*(?:and|,)\s*\$?(\d{1,12})",
    re.IGNORECASE,
)
_REMAINDER = re.compile(
    r"remainder\s+(?:when|of)\s+\$?([\d^*+() ]{1,40}?)\$?\s+(?:is\s+)?divided\s+by\s+\$?(\d{1,12})",
    re.IGNORECASE,
)
_EQUATION = re.compile(
    r"(?:solve|find|determine)\b.{0,60}?\$?(?P<left>[-\dx+*/^(). ]*x[-\dx+*/^(). ]*)="
    r"(?P<right>[-\dx+*/^(). ]+)",
    re.IGNORECASE | re.DOTALL,
)
# "Compute 7." asks for nothing: a model could be right without end.
_OPERATOR = re.compile(r"[+*/^×÷·−]|\d\s*-|sqrt|frac|cdot|times|div")
_HIGHEST_DEGREE = 4


@dataclass(frozen=True, slots=True)
class Computed:
    """What a problem asks for: one number, or all numbers that solve an equation."""

    values: frozenset[sympy.Expr]


def check(problem: Problem) -> Verdict:
    """Compare the answer with what the problem comes to."""
    if not problem.answer.strip():
        return Verdict.MISSING
    wanted = compute(problem.problem)
    given = read_answer(problem.answer)
    if wanted is None:
        return Verdict.UNKNOWN if given else Verdict.NO_NUMBER
    if given is None:
        return Verdict.WRONG
    return Verdict.RIGHT if _are_equal(given, wanted.values) else Verdict.WRONG


def read_answer(answer: str) -> frozenset[sympy.Expr] | None:
    """The numbers of an answer such as `3`, `x = 2 or x = 3`; None where it is none."""
    try:
        parts = [part.rpartition("=")[2] for part in re.split(r"\s+(?:or|and)\s+|;", answer)]
        values = frozenset(parse(part) for part in parts)
    except NotExact:
        return None
    return values if all(value.is_number for value in values) else None


@functools.lru_cache(maxsize=4096)
def compute(problem: str) -> Computed | None:
    """What a problem asks for; None where this module cannot tell.

    Read are: a sum to be computed, greatest common divisor, least common multiple, remainder,
    and an equation in x up to degree four.
    """
    if found := _DIVISOR.search(problem):
        return _one(sympy.Integer(math.gcd(int(found[1]), int(found[2]))))
    if found := _MULTIPLE.search(problem):
        return _one(sympy.Integer(math.lcm(int(found[1]), int(found[2]))))
    try:
        if found := _REMAINDER.search(problem):
            number, divisor = parse(found[1]), int(found[2])
            if not number.is_Integer or not divisor:
                return None
            return _one(number % divisor)
        if found := _EQUATION.search(problem):
            return _solve(parse(found["left"]) - parse(found["right"]))
        if (found := _COMPUTE.search(problem)) and _OPERATOR.search(found["sum"]):
            value = parse(found["sum"])
            return _one(value) if value.is_number else None
    except NotExact:
        return None
    return None


def _one(value: sympy.Expr) -> Computed:
    return Computed(frozenset({value}))


def _solve(zero: sympy.Expr) -> Computed | None:
    x = sympy.Symbol("x")
    if zero.free_symbols != {x} or not zero.is_polynomial(x):
        return None
    polynomial = sympy.Poly(zero, x)
    if polynomial.degree() > _HIGHEST_DEGREE:
        return None
    roots = sympy.roots(polynomial)
    if sum(roots.values()) != polynomial.degree():
        return None
    real = frozenset(root for root in roots if root.is_real)
    return Computed(real) if real else None


def _are_equal(a: frozenset[sympy.Expr], b: frozenset[sympy.Expr]) -> bool:
    if len(a) != len(b):
        return False
    return a == b or all(any(sympy.simplify(x - y) == 0 for y in b) for x in a)
