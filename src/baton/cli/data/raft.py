"""`baton data raft`: sample rows, check a file, have a teacher write one."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from baton.errors import ConfigError, DataError, ExitStatus

FORMAT = click.option(
    "--format",
    "format_name",
    default="medical",
    show_default=True,
    help="medical, berkeley, or a .yaml file of your own.",
)
# Of more notes than that, the first ones and their number say enough.
_SHOWN_NOTES = 20


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
    for mistake in findings.mistakes:
        click.echo(f"error: {mistake}", err=True)
    for note in findings.notes[:_SHOWN_NOTES]:
        click.echo(f"note: {note}", err=True)
    if len(findings.notes) > _SHOWN_NOTES:
        click.echo(f"note: and {len(findings.notes) - _SHOWN_NOTES:,} more notes", err=True)
    click.echo(f"{file}: {findings.summary}")
    if findings.mistakes:
        click.echo(f"{len(findings.mistakes):,} mistakes; nothing can be trained on this file")
        sys.exit(ExitStatus.STOP)


@raft.command()
@click.argument("documents", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL of rows.")
@click.option("--teacher-url", required=True, help="Any OpenAI-compatible API, up to /v1.")
@click.option("--teacher-model", required=True)
@click.option(
    "--key-variable",
    default="OPENAI_API_KEY",
    show_default=True,
    help="The environment variable that holds the key.",
)
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
@click.option("--parallel", type=click.IntRange(1), default=4, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=2048, show_default=True)
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Seconds.")
@click.option("--attempts", type=click.IntRange(1), default=8, show_default=True)
@click.option("--price-in", type=float, help="Of a million prompt tokens.")
@click.option("--price-out", type=float, help="Of a million answer tokens.")
@click.option("--cache", type=click.Path(path_type=Path), help="Default: OUT.replies.")
def build(
    documents: tuple[Path, ...],
    out: Path,
    teacher_url: str,
    teacher_model: str,
    key_variable: str,
    format_name: str,
    field: str,
    chunk_chars: int,
    questions: int,
    distractors: int,
    absent: bool,
    seed: int,
    parallel: int,
    temperature: float,
    max_tokens: int,
    timeout: float,
    attempts: int,
    price_in: float | None,
    price_out: float | None,
    cache: Path | None,
) -> None:
    """Have a teacher write rows from documents: text, Markdown, PDF, docx, JSON rows, folders.

    May be stopped and started at will: what the teacher answered is kept beside OUT and not
    asked again.
    """
    from baton.data.documents import read_documents
    from baton.data.teacher import Teacher, TeacherConfig
    from baton.pipelines.raft import build as building
    from baton.pipelines.raft.format import load_format

    try:
        config = TeacherConfig(
            url=teacher_url,
            model=teacher_model,
            key_variable=key_variable,
            temperature=temperature,
            max_tokens=max_tokens,
            attempts=attempts,
            timeout_seconds=timeout,
            parallel=parallel,
            price_in=price_in,
            price_out=price_out,
        )
    except ValueError as error:
        raise ConfigError(f"the teacher: {error}") from error
    format = load_format(format_name)
    chunks = building.chunk_documents(read_documents(documents, field=field), max_chars=chunk_chars)
    click.echo(f"{len(chunks):,} different chunks of at most {chunk_chars:,} characters")
    teacher = Teacher(config, cache or out.with_name(f"{out.name}.replies"))
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
    usage = teacher.usage
    cost = usage.cost(config)
    click.echo(
        f"asked {usage.asked:,} times ({usage.retried:,} retries), {usage.cached:,} replies were"
        f" there already; {usage.prompt_tokens:,} tokens in, {usage.completion_tokens:,} out"
        + ("" if cost is None else f", cost {cost:.4f}")
    )
    if not tally.rows:
        raise DataError(f"{out}: no row could be made; see {out}.rejects.jsonl")
