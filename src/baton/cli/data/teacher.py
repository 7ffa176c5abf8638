"""The options of commands that ask a teacher, and what they say of its work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from baton.errors import ConfigError

if TYPE_CHECKING:
    from baton.data.teacher import Teacher

F = TypeVar("F", bound=Callable[..., Any])


def teacher_options(*, required: bool) -> Callable[[F], F]:
    """Whom to ask, and how; they arrive as keyword arguments, to be given to `open_teacher`."""

    def decorate(command: F) -> F:
        for option in reversed(
            (
                click.option(
                    "--teacher-url",
                    required=required,
                    help="Any OpenAI-compatible API, up to /v1.",
                ),
                click.option("--teacher-model", required=required),
                click.option(
                    "--key-variable",
                    default="OPENAI_API_KEY",
                    show_default=True,
                    help="The environment variable that holds the key.",
                ),
                click.option("--parallel", type=click.IntRange(1), default=4, show_default=True),
                click.option(
                    "--requests-per-minute",
                    type=float,
                    default=0.0,
                    help="No more than so many; default: as fast as they are answered.",
                ),
                click.option("--temperature", type=float, default=0.0, show_default=True),
                click.option(
                    "--max-tokens", type=click.IntRange(1), default=2048, show_default=True
                ),
                click.option(
                    "--timeout", type=float, default=120.0, show_default=True, help="Seconds."
                ),
                click.option("--attempts", type=click.IntRange(1), default=8, show_default=True),
                click.option("--price-in", type=float, help="Of a million prompt tokens."),
                click.option("--price-out", type=float, help="Of a million answer tokens."),
                click.option(
                    "--cache", type=click.Path(path_type=Path), help="Default: OUT.replies."
                ),
            )
        ):
            command = option(command)
        return command

    return decorate


def open_teacher(
    out: Path,
    *,
    teacher_url: str,
    teacher_model: str,
    key_variable: str,
    parallel: int,
    requests_per_minute: float,
    temperature: float,
    max_tokens: int,
    timeout: float,
    attempts: int,
    price_in: float | None,
    price_out: float | None,
    cache: Path | None,
) -> Teacher:
    """A teacher whose replies are kept beside `out`."""
    from baton.data.teacher import Teacher, TeacherConfig

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
            requests_per_minute=requests_per_minute,
            price_in=price_in,
            price_out=price_out,
        )
    except ValueError as error:
        raise ConfigError(f"the teacher: {error}") from error
    return Teacher(config, cache or out.with_name(f"{out.name}.replies"))


def say_usage(teacher: Teacher) -> None:
    """What was asked, what it took, what it cost."""
    usage = teacher.usage
    cost = usage.cost(teacher.config)
    click.echo(
        f"asked {usage.asked:,} times ({usage.retried:,} retries), {usage.cached:,} replies were"
        f" there already; {usage.prompt_tokens:,} tokens in, {usage.completion_tokens:,} out"
        + ("" if cost is None else f", cost {cost:.4f}")
    )
