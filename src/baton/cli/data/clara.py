"""`baton data clara`: rows of three stages, checked, split, written by a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

from baton.cli.data.findings import say_findings
from baton.cli.data.teacher import open_teacher, say_usage, teacher_options
from baton.errors import ConfigError, DataError


@click.group()
def clara() -> None:
    """Documents, questions and answers, for a compressor of documents and its retriever."""


@clara.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--stage",
    type=click.Choice(["stage1", "stage2", "stage3"]),
    help="Default: stage1 where rows have a data_type, else stage3.",
)
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True)
@click.option("--doc-max-length", type=click.IntRange(1), default=256, show_default=True)
def check(file: Path, stage: str | None, top_k: int, doc_max_length: int) -> None:
    """Name every mistake of a file of rows, with its line and field."""
    from baton.pipelines.clara.check import check as examine
    from baton.pipelines.clara.check import stage_of

    findings = examine(
        file, stage=stage or stage_of(file), top_k=top_k, doc_max_length=doc_max_length
    )
    say_findings(file, findings)


@clara.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder.")
@click.option("--held-out", type=click.FloatRange(0.001, 0.9), default=0.1, show_default=True)
@click.option("--seed", default=42, show_default=True)
def split(file: Path, out: Path, held_out: float, seed: int) -> None:
    """Write OUT/train.jsonl and OUT/held_out.jsonl: the rows that a task would hold out."""
    from baton.pipelines.clara.check import split_file

    train, held = split_file(file, out, held_out=held_out, seed=seed)
    click.echo(f"wrote {out}: {train:,} rows to train on, {held:,} held out")


@clara.command()
@click.argument("documents", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder.")
@click.option(
    "--from-stage1",
    type=click.Path(path_type=Path),
    metavar="ROWS",
    help="Make rows of stages 2 and 3 of rows of stage 1; asks no teacher.",
)
@teacher_options(required=False)
@click.option("--field", default="text", show_default=True, help="Of JSON rows: the document.")
@click.option("--chunk-chars", type=click.IntRange(50), default=900, show_default=True)
@click.option("--top-k", type=click.IntRange(1), default=5, show_default=True)
@click.option("--candidates", type=click.IntRange(1), default=20, show_default=True)
@click.option(
    "--negatives",
    type=click.Choice(["random", "nearest"]),
    default="random",
    show_default=True,
    help="Which documents stand beside the one that answers.",
)
@click.option("--rounds", type=click.IntRange(0), default=10, show_default=True)
@click.option("--seed", default=42, show_default=True)
def build(
    documents: tuple[Path, ...],
    out: Path,
    from_stage1: Path | None,
    field: str,
    chunk_chars: int,
    top_k: int,
    candidates: int,
    negatives: str,
    rounds: int,
    seed: int,
    **teacher: Any,
) -> None:
    """Have a teacher write rows of all stages from documents: text, Markdown, PDF, docx, JSON.

    May be stopped and started at will: what the teacher answered is kept beside OUT and not
    asked again.
    """
    from baton.pipelines.clara import build as building
    from baton.pipelines.clara.negatives import Negatives
    from baton.pipelines.clara.teach import Limits

    try:
        recipe = building.Recipe(
            top_k=top_k,
            candidates=candidates,
            negatives=cast("Negatives", negatives),
            seed=seed,
            limits=Limits(rounds=rounds),
        )
    except ValueError as error:
        raise ConfigError(f"baton data clara build: {error}") from error
    if from_stage1 is not None:
        if documents:
            raise ConfigError("--from-stage1 brings its own documents; give one or the other")
        from baton.pipelines.clara.rows import read_say

        tally = building.build_from_rows(read_say(from_stage1), recipe, out)
        click.echo(
            f"wrote {out}: {tally.rows['stage2']:,} rows of stage 2 and {tally.rows['stage3']:,} of"
            f" stage 3 from {tally.chunks:,} documents"
        )
        return
    _teach(documents, out, field, chunk_chars, recipe, teacher)


def _teach(
    documents: tuple[Path, ...],
    out: Path,
    field: str,
    chunk_chars: int,
    recipe: Any,
    options: dict[str, Any],
) -> None:
    from baton.data.chunks import distinct_chunks
    from baton.data.documents import read_documents
    from baton.pipelines.clara import build as building

    missing = [name for name in ("teacher_url", "teacher_model") if not options[name]]
    if not documents or missing:
        what = "documents" if not documents else f"--{missing[0].replace('_', '-')}"
        raise ConfigError(f"baton data clara build needs {what}, or --from-stage1 ROWS")
    chunks = distinct_chunks(read_documents(documents, field=field), max_chars=chunk_chars)
    click.echo(f"{len(chunks):,} different chunks of at most {chunk_chars:,} characters")
    teacher = open_teacher(out, **options)

    def say(tally: building.Tally) -> None:
        made = ", ".join(f"{count:,} {kind}" for kind, count in tally.rows.items())
        click.echo(f"chunk {tally.chunks:,}/{len(chunks):,}: {made or 'no rows'}", err=True)

    tally = building.build(chunks, teacher, recipe, out, on_chunk=say)
    made = ", ".join(f"{count:,} {kind}" for kind, count in tally.rows.items())
    failed = ", ".join(f"{count:,} {why}" for why, count in tally.failed.most_common()) or "none"
    click.echo(f"wrote {out}: {made} rows from {tally.chunks:,} chunks; rejected: {failed}")
    say_usage(teacher)
    if not tally.rows["stage2"]:
        raise DataError(f"{out}: no question could be made; see {out}/{building.REJECTS}")
