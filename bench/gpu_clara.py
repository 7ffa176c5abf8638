"""Encoding documents packed against one by one and padded, and whole training steps, on one GPU.

    python bench/gpu_clara.py [--documents 160] [--rounds 3] [--no-compile] [--skip-steps]

Random weights of Mistral-7B-Instruct-v0.2's shape in bfloat16, LoRA r 16 on all linear layers,
eight vectors a document (doc_max_length 256, compress_rate 32), document lengths drawn as those of
real stage 1 rows (median 140 tokens). `one by one` pads every document to 267 tokens, as the
reference does; `padded` does so in batches of 20; `packed` is baton's way. All arms encode the
same documents with the same weights in one process, without gradients (stage 3's candidates) and
with (forward and backward, stages 1 and 2); the vectors are compared. Then optimizer steps of
stage 1 are taken through the real loss, with and without recomputed activations. Times are the
medians of the rounds after a warm-up; memory is the peak of an arm. `--tiny` tries the script on a
CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from baton.pipelines.clara.batch import BySamples, ClaraBatch, PackedTexts, memory_positions
from baton.pipelines.clara.config import Stage1
from baton.pipelines.clara.losses import ReadingLoss, encode
from baton.pipelines.clara.memory import Vocabulary
from baton.pipelines.clara.model import ENCODER, ClaraLearner, assemble
from baton.stage import Alone
from baton.train import attention
from baton.train.batch import collate
from baton.train.batching import Whole, pad_multiple
from baton.train.config import AdapterConfig, TrainConfig
from baton.train.layers import is_compiled, recompute_layers
from baton.train.precision import Precision
from baton.train.ranks import Ranks

MISTRAL_7B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
    "max_position_embeddings": 32768, "sliding_window": None, "rope_theta": 1e6,
}  # fmt: skip
TINY = MISTRAL_7B | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
}  # fmt: skip
VECTORS, TEXT = 8, 259
PADDED_BATCH = 20
PACK_TOKENS = 16_384
# Of stage 1 rows: prompt and answers.
PROMPT, ANSWERS = 60, 220


@dataclass(frozen=True)
class Rows:
    """Samples in memory, as a token source."""

    rows: list[tuple[NDArray[np.int64], int]]

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([len(self.rows[i][0]) for i in indices], dtype=np.int64)

    def labelled(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([len(self.rows[i][0]) - self.rows[i][1] for i in indices], dtype=np.int64)

    def sample(self, index: int) -> tuple[NDArray[np.int64], int]:
        return self.rows[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--skip-steps", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args()
    device = Ranks.of(Alone()).device
    if device.type != "cuda" and not args.tiny:
        parser.error("needs a CUDA device; --tiny tries the script on a CPU")
    bench = Bench(device, TINY if args.tiny else MISTRAL_7B, args.documents, args.rounds)
    bench.encoding(gradients=False)
    bench.encoding(gradients=True)
    if not args.skip_steps:
        gc.collect()
        bench.steps(compiled=not args.no_compile)


class Bench:
    """A model, documents, and a stopwatch."""

    def __init__(
        self, device: torch.device, shape: dict[str, Any], documents: int, rounds: int
    ) -> None:
        self.device, self.shape, self.rounds = device, shape, rounds
        half = "bf16" if device.type == "cuda" else "fp32"
        self.precision = Precision.choose(half, device)
        self.pad_to = pad_multiple(device, self.precision)
        vocabulary = shape["vocab_size"]
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(np.log(140), 0.5, documents), 30, TEXT).astype(int)
        memory = np.arange(vocabulary, vocabulary + VECTORS)
        texts = [np.r_[rng.integers(5, vocabulary, n), memory] for n in lengths]
        self.texts = Rows([(ids, len(ids)) for ids in texts])
        self.tokens = int(lengths.sum()) + VECTORS * documents
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}; {documents} documents of {lengths.mean():.0f}")
        print("tokens on average; Mistral-7B's shape, random weights", flush=True)

    def learner(self, *, compiled: bool = False) -> ClaraLearner:
        attention.register()
        config = AutoConfig.for_model("mistral", **self.shape)
        torch.manual_seed(0)
        with self.device:
            network = AutoModelForCausalLM.from_config(
                config, dtype=self.precision.dtype, attn_implementation=attention.NAME
            )
        first = self.shape["vocab_size"]
        return assemble(
            network,
            AdapterConfig(r=16, alpha=32, dropout=0.1, targets="all-linear"),
            Vocabulary(tokenizer=None, vectors=VECTORS, first=first, encoder_tokens=TEXT),
            stage="stage1",
            base_name="random",
            seed=0,
            compiled=compiled and is_compiled(TrainConfig(), self.device),
        )

    # --- encoding -----------------------------------------------------------------------

    def encoding(self, *, gradients: bool) -> None:
        """One table: three ways to encode all documents."""
        gc.collect()
        self._empty()
        learner = self.learner()
        # The same work in every arm: no dropout.
        learner.model.eval()
        print(f"\nencoding, {'forward and backward' if gradients else 'no gradients'}")
        print(f"{'arm':12} {'s':>8} {'documents/s':>12} {'real tokens/s':>14} {'peak GiB':>9}"
              f" {'x':>6}")  # fmt: skip
        arms: dict[str, Callable[[], torch.Tensor]] = {
            "one by one": lambda: self._padded(learner, 1, gradients),
            "padded": lambda: self._padded(learner, PADDED_BATCH, gradients),
            "packed": lambda: self._packed(learner, gradients),
        }
        slowest, vectors = 0.0, {}
        for name, arm in arms.items():
            seconds, peak, vectors[name] = self._timed(arm)
            slowest = slowest or seconds
            documents, tokens = len(self.texts) / seconds, self.tokens / seconds
            print(f"{name:12} {seconds:8.3f} {documents:12,.1f} {tokens:14,.0f} {peak:9.1f}"
                  f" {slowest / seconds:6.2f}", flush=True)  # fmt: skip
        flat = [vectors[name].flatten(1).float() for name in ("one by one", "packed")]
        alike = torch.nn.functional.cosine_similarity(*flat)
        print(f"cosine of packed and one-by-one vectors: at least {float(alike.min()):.5f}")

    def _padded(self, learner: ClaraLearner, size: int, gradients: bool) -> torch.Tensor:
        learner.network.set_attn_implementation("sdpa")
        found = []
        width = TEXT + VECTORS
        for first in range(0, len(self.texts), size):
            some = [ids for ids, _ in self.texts.rows[first : first + size]]
            ids = torch.zeros(len(some), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(some):
                ids[row, width - len(text) :] = torch.from_numpy(text)
                mask[row, width - len(text) :] = 1
            ids, mask = ids.to(self.device), mask.to(self.device)
            with torch.set_grad_enabled(gradients), self.precision.autocast():
                with learner.roles.using(ENCODER):
                    hidden = learner.network.base_model(
                        input_ids=ids, attention_mask=mask, use_cache=False
                    ).last_hidden_state
                vectors = hidden[:, -VECTORS:]
            self._finish(learner, vectors, gradients)
            found.append(vectors.detach())
        return torch.cat(found)

    def _packed(self, learner: ClaraLearner, gradients: bool) -> torch.Tensor:
        learner.network.set_attn_implementation(attention.NAME)
        found, start = [], 0
        while start < len(self.texts):
            end, tokens = start, 0
            while end < len(self.texts) and tokens <= PACK_TOKENS - TEXT - VECTORS:
                tokens += len(self.texts.rows[end][0])
                end += 1
            texts = self._texts(range(start, end))
            with torch.set_grad_enabled(gradients), self.precision.autocast():
                vectors = encode(learner, texts, ENCODER).vectors
            self._finish(learner, vectors, gradients)
            found.append(vectors.detach())
            start = end
        return torch.cat(found)

    def _texts(self, numbers: range) -> PackedTexts:
        lengths = [len(self.texts.rows[i][0]) for i in numbers]
        places = torch.from_numpy(memory_positions(lengths, VECTORS)).to(self.device)
        pack = collate(self.texts, numbers, device=self.device, pad_to=self.pad_to)
        return PackedTexts(pack=pack, memory=places, lengths=tuple(lengths))

    def _finish(self, learner: ClaraLearner, vectors: torch.Tensor, gradients: bool) -> None:
        if gradients:
            vectors.float().square().mean().backward()
            learner.model.zero_grad(set_to_none=True)

    # --- steps --------------------------------------------------------------------------

    def steps(self, *, compiled: bool) -> None:
        """Optimizer-step time of stage 1 by micro-batch, through the real loss."""
        learner = self.learner(compiled=compiled)
        learner.model.train()
        loss = ReadingLoss(learner, Stage1(), compute_dtype=self.precision.dtype)
        how = "compiled" if learner.compiled else "not compiled"
        print(f"\nstage 1, {how}: forward and backward of 16 samples")
        print(
            f"{'recompute':>9} {'micro-batch':>11} {'s':>8} {'real tokens/s':>14} {'peak GiB':>9}"
        )
        for recompute in (False, True):
            layers = len(list(learner.network.base_model.layers))
            recompute_layers(learner.network, layers if recompute else 0)
            for micro in (2, 8, 16):
                batches = [self._batch(range(n, n + micro)) for n in range(0, 16, micro)]
                labelled = sum(len(batch.turns.labels) for batch in batches)
                tokens = sum(
                    sum(batch.documents.lengths) + batch.samples * (PROMPT + ANSWERS)
                    for batch in batches
                )
                whole = Whole(16, labelled)

                def step(batches: list[ClaraBatch] = batches, whole: Whole = whole) -> torch.Tensor:
                    total = torch.zeros((), device=self.device)
                    for batch in batches:
                        with self.precision.autocast():
                            part = loss.part(batch, whole)
                        part.backward()
                        total += part.detach()
                    learner.model.zero_grad(set_to_none=True)
                    return total

                try:
                    seconds, peak, _ = self._timed(step)
                except torch.OutOfMemoryError:
                    print(f"{recompute!s:>9} {micro:11} out of memory", flush=True)
                    learner.model.zero_grad(set_to_none=True)
                    self._empty()
                    continue
                print(f"{recompute!s:>9} {micro:11} {seconds:8.3f} {tokens / seconds:14,.0f}"
                      f" {peak:9.1f}", flush=True)  # fmt: skip

    def _batch(self, numbers: range) -> ClaraBatch:
        """Samples of one document each: a slot for its vectors, then answers to learn."""
        first = self.shape["vocab_size"]
        rng = np.random.default_rng(numbers.start)
        rows = []
        for _ in numbers:
            ids = rng.integers(5, first, PROMPT + ANSWERS)
            ids[10 : 10 + VECTORS] = np.arange(first, first + VECTORS)
            rows.append((ids, PROMPT))
        source = Rows(rows)
        slots = np.concatenate(
            [n * (PROMPT + ANSWERS) + 10 + np.arange(VECTORS) for n in range(len(rows))]
        )
        batching = BySamples(
            device=self.device,
            full=1,
            memory_ids=(first, first + VECTORS),
            share_documents=False,
            pad_to=self.pad_to,
        )
        return ClaraBatch(
            turns=collate(source, range(len(rows)), device=self.device, pad_to=self.pad_to),
            slots=torch.from_numpy(slots).to(self.device),
            documents=batching.texts(self.texts, list(numbers)),
            numbers=tuple((n,) for n in range(len(rows))),
            queries=None,
        )

    # --- the stopwatch ------------------------------------------------------------------

    def _timed(self, arm: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
        """Median seconds, peak GiB, and what the arm returned."""
        result = arm()
        self._empty()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.rounds):
            self._wait()
            started = time.monotonic()
            result = arm()
            self._wait()
            times.append(time.monotonic() - started)
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
        return statistics.median(times), peak, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _empty(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
