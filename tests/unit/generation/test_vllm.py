"""The process beside us: how it is found, spoken to and ended. tests/vllm runs vLLM itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from baton.config.decode import decode
from baton.errors import ConfigError, EngineError
from baton.eval.config import EvalConfig, Sampling
from baton.generation.engine import Request
from baton.generation.vllm import PYTHON, Vllm, require_vllm

REQUESTS = [Request(prompt=[5, 6], seed=1), Request(prompt=[7], seed=2)]

# Answers every prompt with itself and its end token, in the way vLLM's classes do.
STANDS_IN = """
    import json, os, sys, time
    from types import SimpleNamespace as Object

    print("what vLLM prints is no answer", flush=True)

    def SamplingParams(**values):
        return values

    class LLM:
        def __init__(self, **values):
            self.llm_engine, self.held = self, []
            if os.environ.get("NOTED"):
                with open(os.environ["NOTED"], "w") as notes:
                    noted = {"llm": values, "pid": os.getpid(), "rank": os.environ.get("RANK")}
                    json.dump(noted, notes)

        def add_request(self, name, prompt, how):
            self.held.append((name, prompt["prompt_token_ids"], how))

        def has_unfinished_requests(self):
            return bool(self.held)

        def step(self):
            mood = os.environ.get("MOOD")
            if mood == "hangs":
                time.sleep(60)
            name, prompt, how = self.held.pop()
            if mood == "breaks" and not self.held:
                raise RuntimeError("out of everything")
            said = Object(token_ids=[*prompt, how.get("seed") or 0, *how["stop_token_ids"]])
            return [Object(finished=True, request_id=name, outputs=[said])]
"""


@pytest.fixture(scope="module")
def model():
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=50,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vllm.py").write_text(textwrap.dedent(STANDS_IN))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv(PYTHON, sys.executable)
    return tmp_path


def engine(model, folder, **options):
    return Vllm(model, folder, most_tokens=20, max_new_tokens=8, ends=[3], **options)


def test_requests_go_there_and_answers_come_back(model, stand_in, monkeypatch):
    monkeypatch.setenv("NOTED", str(stand_in / "noted"))
    monkeypatch.setenv("RANK", "1")
    made = engine(model, stand_in / "copy")
    assert dict(made.run(REQUESTS)) == {0: [5, 6, 0, 3], 1: [7, 0, 3]}
    drawn = engine(model, stand_in / "copy", sampling=Sampling())
    assert dict(drawn.run(REQUESTS)) == {0: [5, 6, 1, 3], 1: [7, 2, 3]}
    noted = read(stand_in / "noted")
    assert noted["llm"]["max_model_len"] == 20
    assert noted["llm"]["dtype"] == "float32"
    assert noted["rank"] is None, "it is no rank of the task"
    drawn.close()
    assert not (stand_in / "copy").exists()


def test_a_process_that_breaks_is_said_with_its_last_words(model, stand_in, monkeypatch):
    monkeypatch.setenv("MOOD", "breaks")
    answers = []
    with pytest.raises(EngineError, match="answered 1 of 2 prompts") as said:
        answers.extend(engine(model, stand_in / "copy").run(REQUESTS))
    assert "RuntimeError: out of everything" in str(said.value)
    assert answers == [(1, [7, 0, 3])], "what was answered before is kept"


def test_stopping_ends_it_at_once(model, stand_in, monkeypatch):
    monkeypatch.setenv("MOOD", "hangs")
    monkeypatch.setenv("NOTED", str(stand_in / "noted"))
    started = time.monotonic()

    def stop():
        return (stand_in / "noted").exists()

    assert list(engine(model, stand_in / "copy").run(REQUESTS, stop)) == []
    assert time.monotonic() - started < 20
    with pytest.raises(ProcessLookupError):
        os.kill(read(stand_in / "noted")["pid"], 0)


def test_it_dies_with_whoever_asked(stand_in):
    code = """
        import sys
        from pathlib import Path
        from transformers import AutoConfig, AutoModelForCausalLM
        from baton.generation.engine import Request
        from baton.generation.vllm import Vllm

        sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, vocab_size=50)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes))
        made = Vllm(model, Path(sys.argv[1]), most_tokens=9, max_new_tokens=3, ends=[3])
        list(made.run([Request(prompt=[5])]))
    """
    notes = stand_in / "noted"
    asking = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(stand_in / "copy")],
        env={**os.environ, "MOOD": "hangs", "NOTED": str(notes)},
    )
    pid = wait_for(lambda: read(notes)["pid"])
    asking.send_signal(signal.SIGKILL)
    asking.wait()
    wait_for(lambda: not is_alive(pid))


def test_without_vllm_it_is_said_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(ConfigError, match="no vllm package in this environment; use the image"):
        require_vllm()
    monkeypatch.setenv(PYTHON, sys.executable)
    with pytest.raises(ConfigError, match=f"{PYTHON}=.*: this Python has no vllm package"):
        require_vllm()
    monkeypatch.setenv(PYTHON, str(tmp_path / "nobody"))
    with pytest.raises(ConfigError, match="nobody: No such file or directory"):
        require_vllm()


def test_models_that_are_no_chat_models_refuse_it():
    config = decode(EvalConfig, {"generate": {"engine": "vllm"}})
    with pytest.raises(ValueError, match=r"engine: vllm: it reads vectors; leave it out, or at"):
        config.require_padded("it reads vectors")
    decode(EvalConfig, {"generate": {"engine": "padded"}}).require_padded("it reads vectors")


def read(path):
    return json.loads(path.read_text())


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_for(what, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := what():
                return found
        except (FileNotFoundError, ValueError):
            pass
        time.sleep(0.05)
    raise AssertionError("it never came")
