"""What `gpu_sft.py` compares with: other libraries on the same samples, and a float32 reference.

Each peer trains LoRA r 16 on all linear layers of the random 3B model, at the setting that its
documentation recommends for speed, and tells what its first step saw, so that the reference can
say what loss and gradient norm that step has.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sft_samples import QWEN25_3B, Samples, question_lengths, weights

RANK, PACK = 16, 1024
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_STEPS = 2


def reference(first: Path) -> dict[str, float]:
    """Loss and gradient norm of a step's samples, one by one, by PEFT and transformers in float32.

    `first` is what `keep_first_step` wrote. 4-bit weights are not quantised here.
    """
    import torch
    from transformers import AutoModelForCausalLM

    step = json.loads(first.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(
        weights(step["shape"]), dtype=torch.float32, device_map={"": 0}
    )
    if step["method"] != "full":
        torch.manual_seed(0)
        model = with_lora(model.requires_grad_(False), step["rank"])
    labelled = sum(label != -100 for _, labels in step["samples"] for label in labels[1:])
    total = 0.0
    for tokens, labels in step["samples"]:
        ids = torch.tensor(tokens, device="cuda")[None]
        wanted = torch.tensor(labels[1:], device="cuda")
        places = (wanted != -100).nonzero()[:, 0]
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=places).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, wanted[places], reduction="sum")
        (loss / labelled).backward()
        total += loss.item() / labelled
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {"loss": total, "grad_norm": float(torch.stack(norms).norm())}


def keep_first_step(
    path: Path,
    samples: list[tuple[list[int], list[int]]],
    *,
    shape: Mapping[str, Any] = QWEN25_3B,
    method: str = "lora",
    rank: int = RANK,
) -> None:
    """Write what the first step saw: tokens and labels of each sample, -100 for no label."""
    step = {"shape": dict(shape), "method": method, "rank": rank, "samples": samples}
    path.write_text(json.dumps(step), encoding="utf-8")


def trl(steps: int, first: Path, *, quantised: bool = False) -> dict[str, float]:
    """TRL's SFTTrainer: packing, flex attention, Liger's fused loss.

    8 packs twice a step without checkpointing; with 4-bit weights 16 packs with it.
    """
    from trl import SFTTrainer

    batch, accumulated = (16, 1) if quantised else (8, 2)
    model = with_lora(base("flex_attention", quantised=quantised), RANK)
    return run_packed(
        SFTTrainer,
        model,
        first,
        steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        use_liger_kernel=True,
        gradient_checkpointing=quantised,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def unsloth(steps: int, first: Path, *, quantised: bool = False) -> dict[str, float]:
    """unsloth: packing, 16 packs a step; with 4-bit weights its own checkpointing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import unsloth  # before the libraries that it changes
    from trl import SFTTrainer

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(weights(QWEN25_3B)), max_seq_length=PACK, load_in_4bit=quantised
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if quantised else False,
    )
    return run_packed(
        SFTTrainer,
        model,
        first,
        steps,
        per_device_train_batch_size=16,
        gradient_checkpointing=quantised,
    )


def trainer(
    steps: int,
    first: Path,
    *,
    batch: int = 16,
    accumulated: int = 1,
    checkpointing: bool = False,
    quantised: bool = False,
) -> dict[str, float]:
    """HF's Trainer: padded batches."""
    from peft import prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    model = base("sdpa", quantised=quantised)
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model = with_lora(model, RANK)
    if checkpointing:
        model.enable_input_require_grads()
    args = TrainingArguments(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulated,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        remove_unused_columns=False,
        **settings(steps),
    )
    made = rows(batch * accumulated * steps)
    data = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in made]
    return timed(Trainer(model, args, train_dataset=data, data_collator=padded), first)


PEERS: dict[str, Callable[[int, Path], dict[str, float]]] = {
    "trl": trl,
    "trl_qlora": partial(trl, quantised=True),
    "unsloth": unsloth,
    "unsloth_qlora": partial(unsloth, quantised=True),
    "trainer": trainer,
    "trainer_qlora": partial(trainer, checkpointing=True, quantised=True),
    # As guides set it, for memory.
    "trainer_guide": partial(trainer, batch=2, accumulated=8, checkpointing=True),
}


def base(attention: str, *, quantised: bool) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        weights(QWEN25_3B),
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation=attention,
        **({"quantization_config": four_bits} if quantised else {}),
    )
    model.config.use_cache = False
    return model


def with_lora(model: Any, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def rows(count: int) -> list[dict[str, list[int]]]:
    source = Samples(question_lengths(count), QWEN25_3B["vocab_size"])
    made = map(source.labelled_sample, range(count))
    return [{"input_ids": ids, "labels": labels} for ids, labels in made]


def padded(some: list[dict[str, list[int]]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["input_ids"]) for row in some)

    def column(key: str, value: int) -> torch.Tensor:
        return torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in some])

    return {
        "input_ids": column("input_ids", 0),
        "attention_mask": column("attention_mask", 0),
        "labels": column("labels", -100),
    }


def settings(steps: int) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "bf16": True,
        "learning_rate": 1e-4,
        "logging_first_step": True,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": [],
        "optim": "adamw_torch_fused",
        "disable_tqdm": True,
    }


def run_packed(
    trainer_class: Any, model: Any, first: Path, steps: int, **changes: Any
) -> dict[str, float]:
    """TRL's trainer with packing, its own or the one that unsloth changed."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig

    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    config = SFTConfig(
        packing=True, max_length=PACK, dataset_num_proc=1, **settings(steps), **changes
    )
    packs = config.per_device_train_batch_size * config.gradient_accumulation_steps
    made = trainer_class(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows(packs * (steps + 2) * 5)),
        processing_class=tokenizer,
    )
    return timed(made, first)


def timed(made: Any, first: Path) -> dict[str, float]:
    """Real tokens a second after the first steps, and loss and norm of the first one."""
    import torch
    from transformers import TrainerCallback

    seen, marks, said, samples = [0], [], {}, []
    accumulated = made.args.gradient_accumulation_steps

    class Mark(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step >= WARM_STEPS:
                torch.cuda.synchronize()
                marks.append((time.monotonic(), seen[0]))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            for name in ("loss", "grad_norm"):
                if name in (logs or {}):
                    said.setdefault(name, float(logs[name]))

    original, calls = made.training_step, itertools.count()

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        seen[0] += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        if next(calls) < accumulated:
            samples.extend(samples_of(inputs))
        return original(model, inputs, *args, **kwargs)

    made.training_step = counted
    made.add_callback(Mark())
    made.train()
    keep_first_step(first, samples)
    (started, before), (ended, after) = marks[0], marks[-1]
    return {"tokens_per_s": (after - before) / (ended - started), **said}


def samples_of(inputs: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels of each sample of a batch, padded or packed."""
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    for row, (ids, labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
        if positions is None:
            kept = ids.new_ones(ids.shape, dtype=bool) if mask is None else mask[row].bool()
            yield ids[kept].tolist(), labels[kept].tolist()
            continue
        starts = (positions[row] == 0).nonzero()[:, 0].tolist()
        for start, end in itertools.pairwise([*starts, len(ids)]):
            if end - start > 1:
                yield ids[start:end].tolist(), labels[start:end].tolist()
