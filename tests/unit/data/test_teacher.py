"""A teacher that is slow, busy, broken or gone, and is never asked the same twice."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import teacher as far_end

from baton.data.teacher import Teacher, TeacherConfig, in_order
from baton.errors import ConfigError, RefusedError, StoreError, TeacherError


def echo(prompt: str) -> str:
    return f"answer to {prompt}"


@pytest.fixture
def ask(tmp_path: Path):
    """Makes a server and a teacher that asks it; closes the servers at the end."""
    servers = []

    def make(**behaviour):
        options = behaviour.pop("options", {})
        cache = behaviour.pop("cache", tmp_path / "cache")
        server = far_end.Server(far_end.Teacher(behaviour.pop("answer", echo), **behaviour))
        server.__enter__()
        servers.append(server)
        defaults = {"timeout_seconds": 5.0, "attempts": 3}
        config = TeacherConfig(url=server.url, model="m", **(defaults | options))
        return Teacher(config, cache), server.teacher

    yield make
    for server in servers:
        server.__exit__()


def kinds(count: int) -> dict[str, str]:
    """A prompt for each fault that a server with one fault in one meets it with."""
    found: dict[str, str] = {}
    for number in range(1000):
        prompt = f"question {number}"
        request = {
            "model": "m",
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": 2048,
            "seed": 0,
        }
        digest = far_end.digest_of(request)
        kind = far_end.FAULTS[int(digest[:12], 16) % len(far_end.FAULTS)]
        found.setdefault(kind, prompt)
        if len(found) == count:
            break
    return found


def test_every_passing_fault_is_got_over_and_counted(ask) -> None:
    asker, server = ask(faults_one_in=1, silent_seconds=1.2, options={"timeout_seconds": 0.6})
    prompts = kinds(len(far_end.FAULTS))
    useless = prompts.pop("useless")
    for kind, prompt in prompts.items():
        assert asker.ask(prompt).text == echo(prompt), kind
    assert asker.usage.asked == len(prompts)
    assert asker.usage.retried >= len(prompts)
    # An empty answer is an answer; whether it is any use is for the caller to say.
    assert asker.ask(useless).text == ""
    assert asker.ask(useless, attempt=1).text in ("", echo(useless))
    assert set(server.asked.values()) <= {1, 2}


def test_what_was_answered_is_kept_and_not_asked_again(ask, tmp_path: Path) -> None:
    asker, server = ask()
    first = asker.ask("one")
    assert asker.ask("one") == first
    again, other = ask(cache=tmp_path / "cache")
    assert again.ask("one") == first
    assert (sum(server.asked.values()), sum(other.asked.values())) == (1, 0)
    assert (again.usage.asked, again.usage.cached, again.usage.prompt_tokens) == (0, 1, 0)
    assert again.ask("one", attempt=1).text == first.text
    assert sum(other.asked.values()) == 1, "another attempt is another request"
    kept = [json.loads(path.read_bytes()) for path in (tmp_path / "cache").rglob("*.json")]
    assert [k["request"]["messages"][0]["content"] for k in kept] == ["one", "one"]


def test_threads_that_ask_the_same_share_one_request(ask) -> None:
    asker, server = ask(delay_seconds=0.3)
    threads = [threading.Thread(target=asker.ask, args=("same",)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(server.answered.values()) == [1]


def test_results_come_in_order_with_a_bounded_number_under_way(ask) -> None:
    asker, server = ask(delay_seconds=0.02)
    replies = in_order(asker.ask, [f"{i}" for i in range(30)], parallel=3)
    assert [reply.text for reply in replies] == [echo(f"{i}") for i in range(30)]
    assert 1 < server.most_under_way <= 3


def test_a_teacher_that_is_gone_is_given_up_on_and_nothing_is_lost(ask, tmp_path: Path) -> None:
    asker, server = ask(dies_after=2, options={"attempts": 2})
    asker.ask("a"), asker.ask("b")
    with pytest.raises(TeacherError) as caught:
        asker.ask("c")
    assert "did not answer in 2 tries, at last: HTTP 503" in str(caught.value)
    assert "run the same command again to go on" in str(caught.value)
    assert sum(server.asked.values()) == 4
    server.dies_after = None
    assert asker.ask("c").text == echo("c")
    assert asker.usage.cached == 0


def test_nobody_there_is_said(tmp_path: Path) -> None:
    config = TeacherConfig(url="http://127.0.0.1:9/v1", model="m", attempts=1)
    with pytest.raises(TeacherError) as caught:
        Teacher(config, tmp_path).ask("x")
    assert "http://127.0.0.1:9/v1 did not answer in 1 tries" in str(caught.value)


def test_a_key_comes_from_the_environment_alone(ask, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("A_KEY", "canary-token")
    asker, _ = ask(key="canary-token", options={"key_variable": "A_KEY"})
    assert asker.ask("x").text == echo("x")
    assert not any(b"canary" in path.read_bytes() for path in tmp_path.rglob("*.json"))
    assert "canary" not in repr(asker.config)
    wrong, _ = ask(key="canary-token", cache=tmp_path / "other")
    with pytest.raises(ConfigError) as caught:
        wrong.ask("x")
    assert str(caught.value).endswith("set OPENAI_API_KEY")


def test_a_wrong_address_is_said(ask, tmp_path: Path) -> None:
    asker, _ = ask()
    wrong = TeacherConfig(url=asker.config.url.replace("/v1", "/v2"), model="m")
    with pytest.raises(ConfigError) as caught:
        Teacher(wrong, tmp_path / "c").ask("x")
    assert "it usually ends in /v1" in str(caught.value)


def test_a_refused_request_concerns_itself_alone(ask) -> None:
    asker, server = ask()
    server.refuses = "too long"
    with pytest.raises(RefusedError):
        asker.ask("this is too long")
    assert asker.ask("short").text == echo("short")


def test_a_damaged_reply_is_named(ask, tmp_path: Path) -> None:
    asker, _ = ask()
    asker.ask("x")
    [path] = (tmp_path / "cache").rglob("*.json")
    path.write_text("{}")
    with pytest.raises(StoreError) as caught:
        asker.ask("x")
    assert str(caught.value).startswith(f"{path}: not a reply of ours")


def test_no_more_requests_are_sent_than_a_minute_may_have(ask) -> None:
    teacher, _ = ask(options={"requests_per_minute": 600.0, "parallel": 4})
    started = time.monotonic()
    texts = [reply.text for reply in in_order(teacher.ask, ["a", "b", "c", "d", "a"], parallel=4)]
    # Four are sent, a tenth of a second apart; the fifth is known by then, or under way.
    assert time.monotonic() - started >= 0.3
    assert texts == [echo(prompt) for prompt in "abcda"]


def test_tokens_become_money(ask) -> None:
    asker, _ = ask(options={"price_in": 2.0, "price_out": 10.0})
    asker.ask("x" * 400)
    usage = asker.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (100, 102)
    assert usage.cost(asker.config) == pytest.approx((100 * 2 + 102 * 10) / 1e6)


@pytest.mark.parametrize(
    "changes",
    [{"url": "localhost:8000"}, {"attempts": 0}, {"parallel": 0}, {"requests_per_minute": -1.0}],
)
def test_a_teacher_that_cannot_be_asked_is_refused(changes) -> None:
    with pytest.raises(ValueError):
        TeacherConfig(**({"url": "http://x/v1", "model": "m"} | changes))
