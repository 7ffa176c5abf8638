"""`baton data questions`: what the filter of questions_gen makes of a file."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def questions() -> None:
    """Competition problems with their solutions."""


@questions.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--problem", default="problem", show_default=True, help="The column of problems.")
@click.option("--solution", default="solution", show_default=True, help="The column of solutions.")
@click.option(
    "--format", "format_", help="csv, tsv, json, jsonl or parquet; by the name if left out."
)
@click.option("--encoding", help="Found out if left out.")
@click.option(
    "--min-score", default=0.3, show_default=True, help="Rows with a score above it are kept."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Kept rows with what they were judged."
)
def judge(
    file: Path,
    problem: str,
    solution: str,
    format_: str | None,
    encoding: str | None,
    min_score: float,
    out: Path | None,
) -> None:
    """Count what of FILE are competition problems, how difficult, how good and on what."""
    from baton.config.decode import decode
    from baton.data.source import open_source
    from baton.errors import DataError
    from baton.pipelines.questions_gen.config import ProblemData
    from baton.pipelines.questions_gen.data import Census, judged_rows, write_rows

    columns = {"problem": problem, "solution": solution}
    said = {"path": str(file), "encoding": encoding, "format": format_, "columns": columns}
    config = decode(ProblemData, said, where="baton data questions")
    census, kept, rejects = Census(), [], 0
    for row in judged_rows(open_source(config), config):
        if row is None:
            rejects += 1
            continue
        is_kept = row.competition_score > min_score
        census.count(row, is_kept=is_kept)
        if is_kept and out is not None:
            kept.append(row)
    for line in census.lines():
        click.echo(line)
    if rejects:
        click.echo(f"{rejects:,} rows could not be used (empty, too short, twice)")
    if not census.kept:
        raise DataError(f"{file}: no row has a competition score above {min_score:g}")
    if out is not None:
        out.write_bytes(write_rows(kept))
        click.echo(f"wrote {out}: {len(kept):,} rows")
