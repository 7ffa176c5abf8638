"""A teacher behind any OpenAI-compatible URL: patient, counted, and never asked twice."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from baton.data.replies import Replies, Reply
from baton.errors import ConfigError, RefusedError, TeacherError

Message = Mapping[str, str]
T = TypeVar("T")
R = TypeVar("R")

# Work that may be ahead of what is taken, so that one slow answer does not hold up the others.
_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Whom to ask, and how. The key is read from the environment variable `key_variable`.

    Attributes:
        attempts: how often a request is tried when the teacher is busy (429, its Retry-After
            obeyed), fails (5xx, a body that is no JSON) or is silent for `timeout_seconds`.
        parallel: requests under way at once.
        requests_per_minute: no more than so many are sent, evenly spread; 0 is as fast as
            `parallel` of them are answered.
        price_in, price_out: of a million tokens, to say what it cost.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 2048
    seed: int = 0
    attempts: int = 8
    timeout_seconds: float = 120.0
    parallel: int = 4
    requests_per_minute: float = 0.0
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        if self.attempts < 1 or self.parallel < 1:
            raise ValueError("attempts and parallel must be at least 1")
        if not 0 <= self.requests_per_minute < math.inf:
            raise ValueError(
                f"requests_per_minute must be 0 or more, got {self.requests_per_minute}"
            )

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """In the currency of the prices; None where no price was given."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6


@dataclass
class Usage:
    """What was asked of a teacher by this process; replies from the cache cost nothing."""

    asked: int = 0
    cached: int = 0
    retried: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def cost(self, config: TeacherConfig) -> float | None:
        """In the currency of the prices; None where no price was given."""
        return config.cost(self.prompt_tokens, self.completion_tokens)


class _Pace:
    """Lets one pass at a time, and the next no earlier than `seconds` after it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._seconds
        if turn > now:
            time.sleep(turn - now)


class Teacher:
    """Answers requests, from the cache where it can. Safe to use from several threads.

    Only a reply is kept, never a failure. An answer that is malformed for its purpose is the
    caller's to notice: asking again with another `attempt` is another request.
    """

    def __init__(self, config: TeacherConfig, cache: Path) -> None:
        import openai

        self.config = config
        self.usage = Usage()
        self._replies = Replies(cache)
        self._openai = openai
        # A local server takes any key; a hosted one answers 401, and then we say what is missing.
        key = os.environ.get(config.key_variable) or "no-key"
        self._client = openai.OpenAI(
            base_url=config.url,
            api_key=key,
            timeout=config.timeout_seconds,
            max_retries=config.attempts - 1,
        )
        rate = config.requests_per_minute
        self._pace = _Pace(60.0 / rate if rate else 0.0)
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Reply]] = {}

    def spent(self) -> Reply:
        """The tokens of all replies that are kept, over all processes; its text is empty."""
        return self._replies.spent()

    def ask(self, messages: str | Sequence[Message], *, attempt: int = 0) -> Reply:
        """The reply to a conversation, or to one user's prompt.

        Raises:
            RefusedError: the teacher will not answer this request (too long, against rules).
            TeacherError: it did not answer in `attempts` tries.
            ConfigError: URL, key or model is wrong; no request can succeed.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        request = {
            "model": self.config.model,
            "messages": [dict(message) for message in messages],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
            # Another attempt at the same question must be able to come out otherwise.
            "seed": self.config.seed + attempt,
        }
        cached = self._replies.get(request)
        if cached is not None:
            self.usage.add(cached=1)
            return cached
        return self._once(request)

    def _once(self, request: dict[str, Any]) -> Reply:
        """Send a request unless a thread is at it already: then wait for its reply."""
        key = repr(request)
        with self._lock:
            waiting = self._under_way.get(key)
            mine: Future[Reply] = Future()
            if waiting is None:
                self._under_way[key] = mine
        if waiting is not None:
            return waiting.result()
        try:
            reply = self._replies.get(request)
            if reply is None:
                reply = self._send(request)
                self._replies.put(request, reply)
            mine.set_result(reply)
            return reply
        except BaseException as error:
            mine.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._under_way[key]

    def _send(self, request: dict[str, Any]) -> Reply:
        openai, config = self._openai, self.config
        problem = ""
        # What is busy, fails or is silent the client retries itself; a body that is not JSON, not.
        for _ in range(config.attempts):
            self._pace.wait()
            try:
                raw = self._client.chat.completions.with_raw_response.create(**request)
                self.usage.add(retried=raw.retries_taken)
                reply = _reply(raw.parse())
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise ConfigError(
                    f"{config.url} refuses the key ({_short(error)}); set {config.key_variable}"
                ) from error
            except openai.NotFoundError as error:
                raise ConfigError(
                    f"{config.url} has no model {config.model!r}, or is not the address of an API"
                    f" ({_short(error)}); it usually ends in /v1"
                ) from error
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                raise RefusedError(f"{config.url} refuses this request: {_short(error)}") from error
            except openai.APIStatusError as error:
                raise self._silent(f"HTTP {error.status_code}: {_short(error)}") from error
            except openai.APIConnectionError as error:  # a timeout is one, too
                raise self._silent(f"{type(error).__name__}: {_short(error)}") from error
            except (openai.APIResponseValidationError, ValueError, _Malformed) as error:
                problem = f"a reply that is no chat completion ({_short(error)})"
                self.usage.add(retried=1)
                continue
            self.usage.add(
                asked=1,
                prompt_tokens=reply.prompt_tokens,
                completion_tokens=reply.completion_tokens,
            )
            return reply
        raise self._silent(problem)

    def _silent(self, problem: str) -> TeacherError:
        return TeacherError(
            f"{self.config.url} did not answer in {self.config.attempts} tries, at last: {problem}."
            " What it answered is kept; run the same command again to go on"
        )


class _Malformed(Exception):
    """A body that is JSON, but no completion."""


def _reply(completion: Any) -> Reply:
    try:
        choice = completion.choices[0]
        text = choice.message.content
        usage = completion.usage
    except (AttributeError, IndexError, TypeError) as error:
        raise _Malformed(f"{type(error).__name__}: {error}") from error
    if not isinstance(text, str):
        raise _Malformed("the message has no content")
    return Reply(
        text=text,
        is_cut=choice.finish_reason == "length",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"


def in_order(work: Callable[[T], R], items: Iterable[T], *, parallel: int) -> Iterator[R]:
    """`map` over threads: results in the order of the items, a bounded number under way.

    The first failure, in that order, is raised; what is under way then is waited for, so that
    no reply that was paid for is lost.
    """
    with ThreadPoolExecutor(max_workers=parallel) as pool:
        waiting: list[Future[R]] = []
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= parallel * _AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
