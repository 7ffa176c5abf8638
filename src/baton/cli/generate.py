"""`baton generate`: a trained task answers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from baton.cli.options import JSON, SET, SITE, STORE
from baton.cli.target import Target
from baton.errors import ConfigError

if TYPE_CHECKING:
    from baton.eval.answer import Answerer, Ask
    from baton.eval.config import GenerateConfig


@click.command()
@click.option("--task", required=True, metavar="EXP/TASK", help="The task whose model answers.")
@click.option("--question", help="One question; default: the pipeline's built-in samples.")
@click.option(
    "--document",
    "documents",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A document for the question (text, Markdown, PDF, docx); may be repeated.",
)
@click.option("--file", type=click.Path(path_type=Path), help="Answer every row of a file instead.")
@click.option("--greedy", is_flag=True, help="Take the likeliest token, always.")
@click.option("--temperature", type=float)
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--repetition-penalty", type=float)
@click.option("--max-new-tokens", type=int)
@click.option("--seed", type=int, help="Of the draws; the same seed draws the same answer.")
@JSON
@SITE
@STORE
@SET
def generate(
    task: str,
    question: str | None,
    documents: tuple[Path, ...],
    file: Path | None,
    greedy: bool,
    max_new_tokens: int | None,
    as_json: bool,
    site: str,
    store: str | None,
    settings: tuple[str, ...],
    **drawing: float | int | None,
) -> None:
    """Let a trained task answer a question, the rows of a file, or built-in samples.

    On a terminal the answer appears as it is written.
    """
    from baton.process import limit_threads, quiet_libraries

    if file is not None and (question is not None or documents):
        raise ConfigError("--file brings its own questions and documents; give one or the other")
    if documents and question is None:
        raise ConfigError("--document needs a --question about it")
    limit_threads(site)
    quiet_libraries()
    answerer = _answerer(task, settings, site, store)
    config = _decoding(answerer.sampling, greedy, max_new_tokens, drawing)
    asks = _asks(answerer, question, documents, file)
    if as_json:
        answers = [_line(ask, answerer.answer(ask, config)) for ask in asks]
        click.echo(json.dumps(answers, ensure_ascii=False, indent=2))
        return
    _show(answerer, asks, config)


def _answerer(task: str, settings: tuple[str, ...], site: str, store: str | None) -> Answerer:
    from baton.config.decode import decode
    from baton.eval.answer import Trained
    from baton.pipelines import PIPELINES
    from baton.runner import task_store

    target = Target.submitted(task, settings, site, store)
    meant = target.plan.task(target.one_task("generate"))
    place = task_store(target.root, target.plan, meant.name)
    target.place.bring(target.plan, meant.name, checkpoints=0)
    name = f"{target.plan.experiment}/{meant.name}"
    stages = PIPELINES[target.plan.pipeline]().training_stages
    if not any(place.root.glob(f"{stages[-1]}/checkpoints/*/manifest.json")):
        raise ConfigError(
            f"{name} has no checkpoint in {target.place.url} yet; train it first:"
            f" baton submit {name}"
        )
    pipeline = PIPELINES[target.plan.pipeline]()
    config = decode(pipeline.config, meant.config)
    trained = Trained(plan=target.plan, task=meant, config=config, store=place)
    return pipeline.load_answer()(trained)


def _decoding(
    default: GenerateConfig,
    greedy: bool,
    max_new_tokens: int | None,
    drawing: dict[str, float | int | None],
) -> GenerateConfig:
    """The pipeline's defaults with what the command line says instead."""
    from baton.config.decode import decode, encode
    from baton.eval.config import GenerateConfig, Sampling

    changes = {key: value for key, value in drawing.items() if value is not None}
    if greedy and changes:
        odd = ", ".join(f"--{key.replace('_', '-')}" for key in changes)
        raise ConfigError(f"--greedy draws nothing, so it cannot go with {odd}")
    values: dict[str, Any] = encode(default)
    if greedy:
        values["sampling"] = None
    elif changes:
        values["sampling"] = encode(default.sampling or Sampling()) | changes
    if max_new_tokens is not None:
        values["max_new_tokens"] = max_new_tokens
    return decode(GenerateConfig, values, where="the command line")


def _asks(
    answerer: Answerer, question: str | None, documents: Sequence[Path], file: Path | None
) -> Sequence[Ask]:
    from baton.data.documents import read_document
    from baton.eval.answer import Ask

    if file is not None:
        return answerer.read(file)
    if question is None:
        return answerer.samples()
    texts = tuple(read_document(path).text for path in documents)
    return [Ask(question=question, documents=texts)]


def _show(answerer: Answerer, asks: Sequence[Ask], config: GenerateConfig) -> None:
    on_text: Callable[[str], None] | None = None
    if sys.stdout.isatty():

        def on_text(text: str) -> None:
            click.echo(text, nl=False)

    click.echo(f"{config.describe()}, at most {config.max_new_tokens} new tokens", err=True)
    for number, ask in enumerate(asks):
        if len(asks) > 1:
            click.echo(f"{'' if number == 0 else chr(10)}> {ask.question}")
        answer = answerer.answer(ask, config, on_text)
        click.echo("" if on_text else answer)


def _line(ask: Ask, answer: str) -> dict[str, Any]:
    return {**dataclasses.asdict(ask), "answer": answer}
