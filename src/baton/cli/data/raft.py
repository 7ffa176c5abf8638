"""`baton data raft`: sample rows, check a file, have a teacher write one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from baton.cli.data.findings import say_findings
from baton.cli.data.teacher import open_teacher, say_usage, teacher_options
from baton.errors import DataError

FORMAT = click.option(
    "--format",
    "format_name",
    default="medical",
    show_default=True,
    help="medical, berkeley, or a .yaml file of your own.",
)


@click.group()
def raft() -> None:
    """Questions, documents and a teacher's answers."""


@raft.command()
@FORMAT
@click.option("--out", type=click.Path(path_type=Path), help="Default: the terminal.")
def sample(format_name: str, out: Path | None) -> None:
    """Write a small valid example."""
    from baton.pipelines.raft.sample import sample_path

    text = sample_path(format_name).read_text(encoding="utf-8")
    if out is None:
        click.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")
    click.echo(f"wrote {out}: {len(text.splitlines())} rows of the format {format_name}")


@raft.command()
@click.argument("file", type=click.Path(path_type=Path))
@FORMAT
def check(file: Path, format_name: str) -> None:
    """Name every mistake of a file of rows, with its line and field."""
    from baton.pipelines.raft.check import check as examine
    from baton.pipelines.raft.format import load_format

    findings = examine(file, load_format(format_name))
    say_findings(file, findings)


@raft.command()
@click.argument("documents", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL of rows.")
@teacher_options(required=True)
@FORMAT
@click.option("--field", default="text", show_default=True, help="Of JSON rows: the document.")
@click.option("--chunk-chars", type=click.IntRange(50), default=2000, show_default=True)
@click.option("--questions", type=click.IntRange(1), default=3, show_default=True)
@click.option("--distractors", type=click.IntRange(0), default=4, show_default=True)
@click.option(
    "--absent/--no-absent",
    default=True,
    show_default=True,
    help="Also ask for an answer without the oracle, so that training may choose any p.",
)
@click.option("--seed", default=42, show_default=True)
def build(
    documents: tuple[Path, ...],
    out: Path,
    format_name: str,
    field: str,
    chunk_chars: int,
    questions: int,
    distractors: int,
    absent: bool,
    seed: int,
    **teacher_settings: Any,
) -> None:
    """Have a teacher write rows from documents: text, Markdown, PDF, docx, JSON rows, folders.

    May be stopped and started at will: what the teacher answered is kept beside OUT and not
    asked again.
    """
    from baton.data.chunks import distinct_chunks
    from baton.data.documents import read_documents
    from baton.pipelines.raft import build as building
    from baton.pipelines.raft.format import load_format

    format = load_format(format_name)
    chunks = distinct_chunks(read_documents(documents, field=field), max_chars=chunk_chars)
    click.echo(f"{len(chunks):,} different chunks of at most {chunk_chars:,} characters")
    teacher = open_teacher(out, **teacher_settings)
    recipe = building.Recipe(
        chunk_chars=chunk_chars,
        questions=questions,
        distractors=distractors,
        absent=absent,
        seed=seed,
    )

    def say(tally: building.Tally) -> None:
        click.echo(f"chunk {tally.chunks:,}/{len(chunks):,}: {tally.rows:,} rows", err=True)

    tally = building.build(chunks, teacher, format, recipe, out, on_chunk=say)
    dropped = ", ".join(building.iter_reasons(tally)) or "none"
    click.echo(
        f"wrote {out}: {tally.rows:,} rows from {tally.chunks:,} chunks"
        f" ({tally.chunks_without_questions:,} without a question); dropped: {dropped}"
    )
    say_usage(teacher)
    if not tally.rows:
        raise DataError(f"{out}: no row could be made; see {out}.rejects.jsonl")
