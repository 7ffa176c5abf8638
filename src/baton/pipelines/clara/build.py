"""Rows of all three stages: a teacher's work on chunks of documents, or made of stage 1 rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from baton.data.json_lines import JsonLines
from baton.data.teacher import Teacher, in_order
from baton.errors import DataError
from baton.pipelines.clara.memory import is_reserved_in
from baton.pipelines.clara.negatives import Fact, Negatives, ask_rows, facts_of
from baton.pipelines.clara.rows import SayRow
from baton.pipelines.clara.teach import KINDS, Failed, Limits, Made, make

REJECTS = "rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows are made. The same recipe, documents and replies give the same bytes.

    Attributes:
        top_k: documents of a row of stage 2.
        candidates: documents of a row of stage 3.
        negatives: which documents stand beside the one that answers.
    """

    top_k: int = 5
    candidates: int = 20
    negatives: Negatives = "random"
    seed: int = 42
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.candidates < self.top_k:
            raise ValueError(
                f"candidates ({self.candidates}) must be at least top_k ({self.top_k})"
            )


@dataclass
class Tally:
    """What became of the chunks."""

    chunks: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)


def build(
    chunks: Sequence[str],
    teacher: Teacher,
    recipe: Recipe,
    out: Path,
    *,
    on_chunk: Callable[[Tally], None] = lambda tally: None,
) -> Tally:
    """Write `stage1.jsonl`, `stage2.jsonl`, `stage3.jsonl` and `rejects.jsonl` below `out`.

    They appear only when all is done. After a kill the same call goes on from the teacher's
    cache: what was answered is not asked again, and the bytes come out the same.

    Raises:
        DataError: there are fewer chunks than a row has documents.
        TeacherError: the teacher stopped answering; nothing that it said is lost.
    """
    _require_enough(len(chunks), recipe)
    tally = Tally()
    facts: list[Fact] = []
    with JsonLines(out / "stage1.jsonl") as rows, JsonLines(out / REJECTS) as rejects:
        usable = [chunk for chunk in chunks if is_reserved_in(chunk) is None]

        def work(index: int) -> list[Made | Failed]:
            return [make(kind, usable[index], teacher, recipe.limits) for kind in KINDS]

        made = in_order(work, range(len(usable)), parallel=teacher.config.parallel)
        for index, found in enumerate(made):
            tally.chunks += 1
            for one in found:
                if isinstance(one, Failed):
                    tally.failed[f"{one.kind} {one.reason}"] += 1
                    rejects.write(
                        {"kind": one.kind, "reason": one.reason, "detail": one.detail}
                        | {"document": usable[index]}
                    )
                    continue
                tally.rows[one.kind] += 1
                rows.write(
                    {
                        "data_type": "paraphrase" if one.kind == "paraphrase" else "qa",
                        "question": list(one.questions),
                        "answers": list(one.answers),
                        "docs": [usable[index]],
                    }
                )
                facts += [
                    Fact(question, answer, index)
                    for question, answer in zip(one.questions, one.answers, strict=False)
                ]
            on_chunk(tally)
        for chunk in chunks:
            if (word := is_reserved_in(chunk)) is not None:
                tally.failed["reserved word"] += 1
                rejects.write({"reason": "reserved word", "detail": word, "document": chunk})
    _write_asks(facts, usable, recipe, out, tally)
    return tally


def build_from_rows(rows: Sequence[SayRow], recipe: Recipe, out: Path) -> Tally:
    """Write `stage2.jsonl` and `stage3.jsonl` below `out` of rows of stage 1; no teacher is asked.

    Raises:
        DataError: there are fewer documents than a row has.
    """
    documents, facts = facts_of(rows)
    _require_enough(len(documents), recipe)
    tally = Tally(chunks=len(documents))
    _write_asks(facts, documents, recipe, out, tally)
    return tally


def _write_asks(
    facts: Sequence[Fact], documents: Sequence[str], recipe: Recipe, out: Path, tally: Tally
) -> None:
    for stage, count in (("stage2", recipe.top_k), ("stage3", recipe.candidates)):
        with JsonLines(out / f"{stage}.jsonl") as file:
            for row in ask_rows(
                facts, documents, count=count, negatives=recipe.negatives, seed=recipe.seed
            ):
                file.write(row)
            tally.rows[stage] = file.count


def _require_enough(documents: int, recipe: Recipe) -> None:
    if documents < recipe.candidates:
        raise DataError(
            f"{documents} different chunks are too few for rows of {recipe.candidates} candidates;"
            " bring more text, or lower --chunk-chars or --candidates"
        )
