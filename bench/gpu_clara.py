"""Encoding documents packed against one by one and padded, and whole training steps, on GPUs.

    python bench/gpu_clara.py [--arms encode gradients stage1 stage3 memory] [--rounds 2]
    python bench/gpu_clara.py --arms ranks --gpus 2

Random weights of Mistral-7B-Instruct-v0.2's shape in bfloat16, LoRA r 16 on all linear layers,
eight vectors a document (doc_max_length 256, compress_rate 32), document lengths drawn as those of
real stage 1 rows (median 140 tokens).

encode      documents without gradients, as stage 3 does its candidates. `one by one` pads each
            to 267 tokens, as the reference does; `padded` does so in batches of 20; `packed` is
            baton's way. Same documents (one by one only some of them), same weights, one process;
            the vectors are compared.
gradients   the same forward and backward, as stages 1 and 2 do; a pack is as many tokens as a
            padded batch.
stage1      optimizer steps through the real loss, by micro-batch: 16 samples, clipping and AdamW.
stage3      the same with 32 samples of 20 candidates, of which 5 are read.
memory      a small model through `baton run`, with all the memory and with too little: the
            micro-batch is halved, the losses stay.
ranks       a small model through `baton run` in one process and in `--gpus` of them.

Times are medians of the rounds after a warm-up; memory is the peak of an arm. Every line is
printed as soon as it is known. `--tiny` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

import clara_runs
from baton.pipelines.clara.batch import BySamples, ClaraBatch, PackedTexts, memory_positions
from baton.pipelines.clara.config import Stage1, Stage3
from baton.pipelines.clara.losses import ReadingLoss, RetrievalLoss, encode
from baton.pipelines.clara.memory import Vocabulary
from baton.pipelines.clara.model import ENCODER, ClaraLearner, assemble
from baton.stage import Alone
from baton.train import attention
from baton.train.batch import collate
from baton.train.batching import Whole, pad_multiple
from baton.train.config import AdapterConfig, TrainConfig
from baton.train.layers import is_compiled, layers_of, recompute_layers
from baton.train.optim import build_optimizer
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
# With gradients, a layer keeps some 300 kB a token: the larger pack would not fit into 140 GB.
GRADIENT_PACK_TOKENS = PADDED_BATCH * (TEXT + VECTORS)
# Without batches an eighth of the documents is measured as well, and in less time.
ONE_BY_ONE_SHARE = 8
ARMS = ("encode", "gradients", "stage1", "stage3", "memory", "ranks")
USUAL_ARMS = ("encode", "gradients", "stage3", "memory")


@dataclass(frozen=True, kw_only=True)
class Step:
    """The samples of one optimizer step, in tokens: prompt without vectors, and answer."""

    stage: str
    samples: int
    prompt: int
    answer: int
    candidates: int
    read: int
    query: int
    micro_batches: tuple[int, ...]


STEPS = {
    # Of stage 1 rows: some nine questions with their answers.
    "stage1": Step(
        stage="stage1", samples=16, prompt=60, answer=220, candidates=1, read=1, query=0,
        micro_batches=(2, 8, 16),
    ),
    # The defaults: a batch of 32, top_k 5, and the 20 candidates of `baton data clara build`.
    "stage3": Step(
        stage="stage3", samples=32, prompt=70, answer=20, candidates=20, read=5, query=30,
        micro_batches=(2, 8, 32),
    ),
}  # fmt: skip


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(USUAL_ARMS))
    parser.add_argument("--documents", type=int, default=160, help="of encode and gradients")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2, help="processes of ranks")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    args = parser.parse_args()
    device = Ranks.of(Alone()).device
    if device.type != "cuda" and not args.tiny:
        parser.error("needs a CUDA device; --tiny tries the script on a CPU")
    started = time.monotonic()
    bench = Bench(device, TINY if args.tiny else MISTRAL_7B, args.documents, args.rounds)
    for arm in args.arms:
        bench.tidy()
        if arm in ("encode", "gradients"):
            bench.encoding(gradients=arm == "gradients")
        elif arm in STEPS:
            bench.steps(STEPS[arm], may_compile=not args.no_compile)
        else:
            with tempfile.TemporaryDirectory(prefix="baton-bench-") as place:
                folder = Path(place) / "rows"
                if arm == "memory":
                    clara_runs.memory(folder, tiny=args.tiny)
                else:
                    clara_runs.ranks(folder, args.gpus, tiny=args.tiny)
        print(f"[{arm}: at {time.monotonic() - started:.0f} s]", flush=True)


class Bench:
    """A model, documents, and a stopwatch."""

    def __init__(
        self, device: torch.device, shape: dict[str, Any], documents: int, rounds: int
    ) -> None:
        self.device, self.shape, self.rounds = device, shape, rounds
        half = "bf16" if device.type == "cuda" else "fp32"
        self.precision = Precision.choose(half, device)
        self.pad_to = pad_multiple(device, self.precision)
        self.texts = self._documents(documents)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}; {documents} documents of"
              f" {self._real(range(documents)) / documents - VECTORS:.0f} tokens on average;"
              f" {'Mistral-7B' if shape is MISTRAL_7B else 'a tiny'} shape, random weights",
              flush=True)  # fmt: skip

    def _documents(self, count: int) -> Rows:
        """Texts of random tokens, each with its memory tokens at the end."""
        first = self.shape["vocab_size"]
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(np.log(140), 0.5, count), 30, TEXT).astype(int)
        memory = np.arange(first, first + VECTORS)
        texts = [np.r_[rng.integers(5, first, n), memory] for n in lengths]
        return Rows([(ids, len(ids)) for ids in texts])

    def _real(self, numbers: range) -> int:
        """Tokens of some documents, memory tokens included."""
        return sum(len(self.texts.rows[i][0]) for i in numbers)

    def learner(self, stage: str, *, compiled: bool = False) -> ClaraLearner:
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
            stage=stage,
            base_name="random",
            seed=0,
            compiled=compiled,
        )

    # --- encoding -----------------------------------------------------------------------

    def encoding(self, *, gradients: bool) -> None:
        """One table: three ways to encode the documents."""
        learner = self.learner("stage1")
        # The same work in every arm: no dropout.
        learner.model.eval()
        everything = range(len(self.texts))
        some = range(max(PADDED_BATCH, len(self.texts) // ONE_BY_ONE_SHARE))
        print(f"\nencoding, {'forward and backward' if gradients else 'no gradients'}")
        print(f"{'arm':12} {'documents':>9} {'s':>8} {'documents/s':>12} {'real tokens/s':>14}"
              f" {'peak GiB':>9} {'x':>6}", flush=True)  # fmt: skip
        slowest, vectors = 0.0, {}
        for name, numbers, arm in (
            ("one by one", some, lambda: self._padded(learner, some, 1, gradients)),
            (
                "padded",
                everything,
                lambda: self._padded(learner, everything, PADDED_BATCH, gradients),
            ),
            ("packed", everything, lambda: self._packed(learner, everything, gradients)),
        ):
            try:
                seconds, peak, vectors[name] = self._timed(arm)
            except torch.OutOfMemoryError:
                print(f"{name:12} out of memory", flush=True)
                learner.model.zero_grad(set_to_none=True)
                continue
            rate = len(numbers) / seconds
            slowest = slowest or rate
            print(f"{name:12} {len(numbers):9} {seconds:8.3f} {rate:12,.1f}"
                  f" {self._real(numbers) / seconds:14,.0f} {peak:9.1f} {rate / slowest:6.2f}",
                  flush=True)  # fmt: skip
        if {"one by one", "packed"} <= vectors.keys():
            one, packed = (vectors[name].flatten(1).float() for name in ("one by one", "packed"))
            alike = torch.nn.functional.cosine_similarity(one, packed[: len(one)])
            print(f"cosine of packed and one-by-one vectors: at least {float(alike.min()):.5f}")

    def _padded(
        self, learner: ClaraLearner, numbers: range, size: int, gradients: bool
    ) -> torch.Tensor:
        learner.network.set_attn_implementation("sdpa")
        found = []
        width = TEXT + VECTORS
        for first in range(0, len(numbers), size):
            some = [self.texts.rows[i][0] for i in numbers[first : first + size]]
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

    def _packed(self, learner: ClaraLearner, numbers: range, gradients: bool) -> torch.Tensor:
        learner.network.set_attn_implementation(attention.NAME)
        budget = GRADIENT_PACK_TOKENS if gradients else PACK_TOKENS
        found = []
        for some in self._packs(numbers, budget):
            with torch.set_grad_enabled(gradients), self.precision.autocast():
                vectors = encode(learner, self._texts(some), ENCODER).vectors
            self._finish(learner, vectors, gradients)
            found.append(vectors.detach())
        return torch.cat(found)

    def _packs(self, numbers: range, budget: int) -> Iterator[range]:
        """Neighbours that are at most `budget` tokens together."""
        start = 0
        while start < len(numbers):
            end, tokens = start, 0
            while end < len(numbers) and tokens <= budget - TEXT - VECTORS:
                tokens += len(self.texts.rows[numbers[end]][0])
                end += 1
            yield numbers[start:end]
            start = end

    def _texts(self, numbers: Sequence[int]) -> PackedTexts:
        lengths = [len(self.texts.rows[i][0]) for i in numbers]
        places = torch.from_numpy(memory_positions(lengths, VECTORS)).to(self.device)
        pack = collate(self.texts, numbers, device=self.device, pad_to=self.pad_to)
        return PackedTexts(pack=pack, memory=places, lengths=tuple(lengths))

    def _finish(self, learner: ClaraLearner, vectors: torch.Tensor, gradients: bool) -> None:
        if gradients:
            vectors.float().square().mean().backward()
            learner.model.zero_grad(set_to_none=True)

    # --- steps --------------------------------------------------------------------------

    def steps(self, kind: Step, *, may_compile: bool) -> None:
        """Whole optimizer steps of a stage by micro-batch, through the real loss."""
        print(f"\n{kind.stage}: an optimizer step of {kind.samples} samples with {kind.candidates}"
              f" documents each")  # fmt: skip
        print(f"{'layers':>12} {'recompute':>9} {'micro-batch':>11} {'s':>8} {'real tokens/s':>14}"
              f" {'samples/s':>10} {'peak GiB':>9}", flush=True)  # fmt: skip
        self.texts = self._documents(kind.samples * kind.candidates)
        may_compile = may_compile and is_compiled(TrainConfig(), self.device)
        for compiled in (False, True) if may_compile else (False,):
            self.tidy()
            learner = self.learner(kind.stage, compiled=compiled)
            learner.model.train()
            layers_are = "compiled" if compiled else "as they are"
            layers = len(layers_of(learner.network))
            # What compiling brings is seen at one size.
            sizes = kind.micro_batches if compiled or not may_compile else kind.micro_batches[1:2]
            for micro in sizes:
                recompute_layers(learner.network, 0)
                self._step_line(learner, kind, micro, f"{layers_are:>12} {False!s:>9}")
            if sizes == kind.micro_batches:
                recompute_layers(learner.network, layers)
                self._step_line(learner, kind, sizes[-1], f"{layers_are:>12} {True!s:>9}")
            del learner

    def _step_line(self, learner: ClaraLearner, kind: Step, micro: int, layers: str) -> None:
        batches = [
            self._batch(kind, range(first, min(first + micro, kind.samples)))
            for first in range(0, kind.samples, micro)
        ]
        whole = Whole(kind.samples, sum(len(batch.turns.labels) for batch in batches))
        tokens = sum(_tokens(batch) for batch in batches)
        dtype = self.precision.dtype
        stage = Stage3() if kind.stage == "stage3" else Stage1()
        loss: ReadingLoss | RetrievalLoss
        if isinstance(stage, Stage3):
            loss = RetrievalLoss(learner, stage, compute_dtype=dtype)
        else:
            loss = ReadingLoss(learner, stage, compute_dtype=dtype)
        named = [(n, p) for n, p in learner.model.named_parameters() if p.requires_grad]
        optimizer = build_optimizer(named, stage.train)
        parameters = [p for _, p in named]

        def step() -> torch.Tensor:
            total = torch.zeros((), device=self.device)
            for batch in batches:
                with self.precision.autocast():
                    part = loss.part(batch, whole)
                part.backward()
                total += part.detach()
            self.precision.step(optimizer, parameters, stage.train.clip_norm)
            optimizer.zero_grad(set_to_none=True)
            return total

        how = f"{layers} {micro:11}"
        try:
            seconds, peak, _ = self._timed(step)
        except torch.OutOfMemoryError:
            print(f"{how} out of memory", flush=True)
            optimizer.zero_grad(set_to_none=True)
        else:
            print(f"{how} {seconds:8.3f} {tokens / seconds:14,.0f}"
                  f" {kind.samples / seconds:10.2f} {peak:9.1f}", flush=True)  # fmt: skip

    def _batch(self, kind: Step, numbers: range) -> ClaraBatch:
        """A micro-batch: slots for the vectors that are read, then answers to learn."""
        first = self.shape["vocab_size"]
        rng = np.random.default_rng(numbers.start)
        slots = kind.read * VECTORS
        prompt = kind.prompt + slots
        turns = []
        for _ in numbers:
            ids = rng.integers(5, first, prompt + kind.answer)
            ids[10 : 10 + slots] = np.tile(np.arange(first, first + VECTORS), kind.read)
            turns.append((ids, prompt))
        starts = np.arange(len(turns)) * (prompt + kind.answer) + 10
        batching = BySamples(
            device=self.device,
            full=1,
            memory_ids=(first, first + VECTORS),
            share_documents=kind.query > 0,
            pad_to=self.pad_to,
        )
        documents = range(numbers.start * kind.candidates, numbers.stop * kind.candidates)
        queries = None
        if kind.query:
            memory = np.arange(first, first + VECTORS)
            asked = [np.r_[rng.integers(5, first, kind.query), memory] for _ in numbers]
            source = Rows([(ids, len(ids)) for ids in asked])
            queries = batching.texts(source, range(len(asked)))
        return ClaraBatch(
            turns=collate(Rows(turns), range(len(turns)), device=self.device, pad_to=self.pad_to),
            slots=torch.from_numpy((starts[:, None] + np.arange(slots)).ravel()).to(self.device),
            documents=batching.texts(self.texts, documents),
            numbers=tuple(
                tuple(range(n * kind.candidates, (n + 1) * kind.candidates))
                for n in range(len(turns))
            ),
            queries=queries,
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

    def tidy(self) -> None:
        """Give back what earlier arms took."""
        gc.collect()
        self._empty()

    def _empty(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _tokens(batch: ClaraBatch) -> int:
    """Real tokens of a micro-batch: documents, queries and turns, without what fills packs up."""
    documents = sum(batch.documents.lengths)
    queries = 0 if batch.queries is None else sum(batch.queries.lengths)
    return documents + queries + sum(batch.turns.lengths[: batch.samples])


if __name__ == "__main__":
    main()
