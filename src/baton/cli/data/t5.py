"""`baton data t5`: pairs of prompt and response for t5_pretrain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from baton.data.config import PairConfig
    from baton.data.source import RowSource

F = TypeVar("F", bound=Callable[..., Any])


def _source_options(command: F) -> F:
    """FILE and how it is read: the same for all three commands."""
    for option in (
        click.option("--prompt", default="prompt", show_default=True, metavar="COLUMN[+COLUMN]"),
        click.option(
            "--response", default="response", show_default=True, metavar="COLUMN[+COLUMN]"
        ),
        click.option("--encoding", metavar="NAME", help="Default: found out."),
        click.option(
            "--format", "format_", metavar="NAME", help="csv tsv json jsonl parquet; by its name."
        ),
        click.argument("file", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@click.group()
def t5() -> None:
    """Pairs of prompt and response: CSV, TSV, JSON, JSONL or Parquet, in any encoding."""


@t5.command()
@_source_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder.")
@click.option("--valid-share", default=0.01, show_default=True, help="Part held out.")
@click.option("--seed", default=42, show_default=True, help="Which prompts are held out.")
@click.option("--min-chars", default=1, show_default=True)
@click.option("--max-chars", default=100_000, show_default=True)
def prepare(
    file: Path,
    prompt: str,
    response: str,
    encoding: str | None,
    format_: str | None,
    out: Path,
    valid_share: float,
    seed: int,
    min_chars: int,
    max_chars: int,
) -> None:
    """Convert FILE to OUT/train.parquet and valid.parquet; print what it is like.

    Rows that cannot be used are in OUT/rejects.jsonl, each with its line and the reason.
    """
    from baton.data.pair_files import REJECTS, convert

    config, source = _open(
        file,
        prompt,
        response,
        encoding,
        format_,
        valid_share=valid_share,
        seed=seed,
        min_chars=min_chars,
        max_chars=max_chars,
    )
    report = convert(source, config, out)
    for line in report.lines():
        click.echo(line)
    click.echo(f"train {report.train:,}, valid {report.valid:,}")
    click.echo(f"written to {out}; rows left out are in {out / REJECTS}")


@t5.command()
@_source_options
def quality(
    file: Path, prompt: str, response: str, encoding: str | None, format_: str | None
) -> None:
    """Print what FILE is like: shape, columns, nulls, lengths, first rows. Writes nothing."""
    from baton.data.pair_files import examine

    config, source = _open(file, prompt, response, encoding, format_)
    for line in examine(source, config).lines():
        click.echo(line)


@t5.command()
@_source_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A folder.")
@click.option("--vocab", default=29_298, show_default=True, help="Tokens, special ones included.")
@click.option("--rows", default=500_000, show_default=True, help="Train on the first so many.")
def tokenizer(
    file: Path,
    prompt: str,
    response: str,
    encoding: str | None,
    format_: str | None,
    out: Path,
    vocab: int,
    rows: int,
) -> None:
    """Train a byte-level BPE tokenizer on FILE and write it to OUT."""
    from baton.data.pair_files import write_vocabulary

    config, source = _open(file, prompt, response, encoding, format_)
    for line in write_vocabulary(source, config, out, vocab=vocab, rows=rows):
        click.echo(line)


def _open(
    file: Path,
    prompt: str,
    response: str,
    encoding: str | None,
    format_: str | None,
    **values: Any,
) -> tuple[PairConfig, RowSource]:
    from baton.config.decode import decode
    from baton.data.config import PairConfig
    from baton.data.source import open_source

    columns = {"prompt": prompt.split("+"), "response": response.split("+")}
    said = {"path": str(file), "encoding": encoding, "format": format_, "columns": columns}
    config = decode(PairConfig, said | values, where="baton data t5")
    return config, open_source(config)
