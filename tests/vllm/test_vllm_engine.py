"""vLLM answers as transformers does, and a task whose answers it writes can be preempted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.eval.config import Sampling
from baton.generation.engine import Request
from baton.generation.vllm import Vllm
from baton.train.adapters import attach
from baton.train.config import AdapterConfig

REPOSITORY = Path(__file__).parents[2]
NEW = 60
# vLLM's attention on a CPU wants heads of at least 32.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
EXPERIMENT = """
pipeline: medical_qa
matrix: {eval.generate.engine: [padded, vllm]}
model:
  source: random
  config: {model_type: qwen2, hidden_size: 128, intermediate_size: 128, num_hidden_layers: 2,
           num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512,
           initializer_range: 0.2}
  tokenizer_vocab: 800
data:
  path: jobs/smoke/medical_qa.csv
  columns: {question: ask, answer: answer}
  rows: 80
  max_length: 128
adapter: {r: 8, alpha: 32, targets: all-linear}
train: {max_steps: 20, batch_samples: 8, learning_rate: 5e-3}
eval:
  generate: {max_new_tokens: 32, batch_size: 4}
  bootstrap_resamples: 100
"""


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def network(kind, **values):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    adapter = AdapterConfig(method="lora", r=4, alpha=8, targets="all-linear")
    model = attach(model, adapter, base_name="base", seed=0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def prompts():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 120, (24,), generator=generator).tolist()
    return [torch.randint(10, 300, (n,), generator=generator).tolist() for n in lengths]


def engine(model, folder, **options):
    settings = {"most_tokens": 120 + NEW, "max_new_tokens": NEW, "ends": [7]}
    return Vllm(model, folder, **settings | options)


def greedy(model, prompt, ends):
    out = model.generate(
        input_ids=torch.tensor([prompt]),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def gap(model, prompt, found, expected):
    """How far apart the first two tokens that differ were, in standard deviations; 0 if none do."""
    pairs = enumerate(zip(found, expected, strict=False))
    first = next((place for place, (a, b) in pairs if a != b), None)
    if first is None:
        assert found == expected
        return 0.0
    with torch.no_grad():
        logits = model(torch.tensor([prompt + expected[:first]])).logits[0, -1]
    return float((logits[found[first]] - logits[expected[first]]).abs() / logits.std())


@pytest.mark.parametrize(
    ("kind", "values"), [("qwen2", {"tie_word_embeddings": True}), ("llama", {})]
)
def test_greedy_answers_are_those_of_transformers(kind, values, tmp_path):
    model = network(kind, **values)
    ends = [greedy(model, prompt, [])[9] for prompt in prompts()[:3]]
    made = engine(model, tmp_path / "copy", ends=ends)
    found = dict(made.run([Request(prompt=p) for p in prompts()]))
    expected = {i: greedy(model, p, ends) for i, p in enumerate(prompts())}
    assert found.keys() == expected.keys()
    gaps = [gap(model, p, found[i], expected[i]) for i, p in enumerate(prompts())]
    # Both add up in another order: where they part, the two tokens were as good as equal.
    assert max(gaps) < 1e-4
    assert sum(gap == 0 for gap in gaps) > len(gaps) / 2
    assert any(tokens[-1] in ends for tokens in expected.values()), "some end by themselves"
    assert any(len(tokens) == NEW for tokens in expected.values()), "some are cut off"
    made.close()


def test_draws_repeat_by_their_seeds(tmp_path):
    made = engine(network("qwen2"), tmp_path / "copy", sampling=Sampling(temperature=2.0))
    asked = [Request(prompt=[5, 6, 8], seed=seed) for seed in (1, 2, 1)]
    first, second, again = (tokens for _, tokens in sorted(made.run(asked)))
    assert first == again
    assert first != second


def baton(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "baton", *map(str, words)],
        env={**os.environ, "BATON_HOME": str(REPOSITORY), "BATON_DEVICE": "cpu"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def test_a_task_asks_vllm_is_preempted_and_ends_with_the_same_answers(tmp_path):
    experiment, store = tmp_path / "engines.yaml", tmp_path / "runs"
    experiment.write_text(EXPERIMENT)
    words = ("run", experiment, "--task", "vllm", "--store", store)
    leg = baton(*words)
    until = time.monotonic() + 240
    while not [*store.glob("**/tasks/vllm/.vllm-0/vllm.log")]:
        assert leg.poll() is None, leg.communicate()[0]
        assert time.monotonic() < until, "vLLM was not asked"
        time.sleep(0.1)
    leg.send_signal(signal.SIGTERM)
    said, _ = leg.communicate(timeout=60)
    assert leg.returncode == 75, said
    assert "state=handed_over" in said
    for task in ("vllm", "padded"):
        leg = baton("run", experiment, "--task", task, "--store", store)
        said, _ = leg.communicate(timeout=240)
        assert leg.returncode == 0, said
    answers, records = {}, {}
    for task in ("vllm", "padded"):
        [folder] = store.glob(f"**/tasks/{task}/eval")
        answers[task] = [
            json.loads(line)["prediction"]
            for line in (folder / "predictions.jsonl").read_text().splitlines()
        ]
        records[task] = json.loads((folder / "eval.json").read_text())
    assert len(answers["vllm"]) > 4
    assert answers["vllm"] == answers["padded"]
    assert records["vllm"]["scores"] == records["padded"]["scores"]
    assert not [*store.glob("**/.vllm-*")], "the copy of the model is gone"
