"""What kind of problem a text is: competition score, difficulty, quality, topics.

Pure functions of the text, as the guide behind this pipeline defines them. Keywords are looked
for as parts of the lower-cased text, so "imo" is found in "limousine", too.
"""

from __future__ import annotations

import re

# Added once for each that occurs, in this order, in plain floats: 0.1 + 0.2 is above 0.3.
COMPETITION_WEIGHTS = (
    ("prove", 0.3),
    ("find all", 0.25),
    ("determine", 0.2),
    ("show that", 0.25),
    ("inequality", 0.2),
    ("polynomial", 0.15),
    ("optimization", 0.2),
    ("olympiad", 0.4),
    ("competition", 0.3),
    ("contest", 0.3),
    ("integer", 0.15),
    ("prime", 0.2),
    ("modular", 0.15),
    ("triangle", 0.1),
    ("circle", 0.1),
    ("geometry", 0.15),
    ("combinatorics", 0.2),
    ("permutation", 0.15),
    ("combination", 0.15),
)
_POWER = re.compile(r"x\^[3-9]|x\^\{[0-9]+\}")
_EQUATION = re.compile(r"[a-z]\s*=\s*[^,\s]+")

DIFFICULTIES = ("basic", "intermediate", "advanced", "olympiad")
_ADVANCED = ("olympiad", "contest", "prove", "lemma", "theorem")
_OLYMPIAD = ("olympiad", "usamo", "imo")
_INTERMEDIATE = ("polynomial", "inequality", "optimization", "calculus")
_MANY_LINES = 5

_BONUS = ("therefore", "thus", "hence", "proof", "qed", "solution:")
_PLAIN = ("find x", "solve for", "what is")

DEFAULT_TOPIC = "Basic_Math:Arithmetic"
TOPICS = {
    "Algebra:Polynomials": ("polynomial", "quadratic", "cubic", "coefficient"),
    "Algebra:Equations": ("equation", "solve", "unknown"),
    "Algebra:Inequalities": ("inequality", "at least", "at most", "maximum", "minimum"),
    "Algebra:Functions": ("function", "f(x)", "logarithm", "exponent"),
    "Algebra:Sequences": ("sequence", "series", "arithmetic progression", "geometric progression"),
    "Number_Theory:Primes": ("prime", "factorization"),
    "Number_Theory:Divisibility": ("divisible", "divisor", "multiple", "gcd", "lcm"),
    "Number_Theory:Modular_Arithmetic": ("modular", "modulo", "remainder", "congruent"),
    "Number_Theory:Integers": ("integer", "digit"),
    "Geometry:Triangles": ("triangle", "hypotenuse"),
    "Geometry:Circles": ("circle", "radius", "chord", "tangent line"),
    "Geometry:Polygons": ("polygon", "square", "rectangle", "trapezoid", "parallelogram"),
    "Geometry:Solids": ("sphere", "cylinder", "cube ", "prism", "pyramid"),
    "Geometry:Coordinates": ("coordinate", "slope", "midpoint"),
    "Combinatorics:Counting": ("how many ways", "permutation", "combination", "arrangement"),
    "Combinatorics:Probability": ("probability", "dice", "random"),
    "Combinatorics:Graphs": ("graph theory", "vertices", "edges"),
    "Calculus:Derivatives": ("derivative", "differentiate"),
    "Calculus:Integrals": ("integral", "antiderivative"),
    "Calculus:Limits": ("limit", "converge"),
}
"""`Topic:Subtopic` and the keywords of each."""


def competition_score(problem: str, solution: str) -> float:
    """How much of a competition problem this is, 0 to 1; above 0.3 it counts as one."""
    text = f"{problem} {solution}".lower()
    score = 0.0
    for keyword, weight in COMPETITION_WEIGHTS:
        if keyword in text:
            score += weight
    if _POWER.search(text):
        score += 0.15
    if len(_EQUATION.findall(text)) > 2:
        score += 0.1
    if "theorem" in text or "lemma" in text:
        score += 0.2
    return min(score, 1.0)


def difficulty(problem: str, solution: str) -> str:
    """One of `DIFFICULTIES`."""
    text = f"{problem} {solution}".lower()
    if any(word in text for word in _ADVANCED):
        return "olympiad" if any(word in text for word in _OLYMPIAD) else "advanced"
    if any(word in text for word in _INTERMEDIATE) or len(solution.split("\n")) > _MANY_LINES:
        return "intermediate"
    return "basic"


def quality(problem: str, solution: str) -> float:
    """Length, signs of reasoning and plain phrases, 0 to 1."""
    length = len(problem)
    score = 0.25 if 50 <= length <= 300 else 0.1 if length < 50 else 0.15
    if len(solution) > 100:
        score += 0.25
    solved, asked = solution.lower(), problem.lower()
    score += min(0.1 * sum(phrase in solved for phrase in _BONUS), 0.3)
    score -= 0.05 * sum(phrase in asked for phrase in _PLAIN)
    return max(0.0, min(score, 1.0))


def topics(problem: str, solution: str) -> tuple[str, ...]:
    """Every `Topic:Subtopic` with a keyword in the text, the one with most of them first.

    Of equals the first in `TOPICS`; `DEFAULT_TOPIC` where there is none.
    """
    text = f"{problem} {solution}".lower()
    found = {topic: sum(word in text for word in words) for topic, words in TOPICS.items()}
    named = [topic for topic, count in found.items() if count]
    return tuple(sorted(named, key=lambda topic: -found[topic])) or (DEFAULT_TOPIC,)
