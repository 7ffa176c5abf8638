"""The base model and its tokenizer, from wherever the experiment says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from baton.config.experiment import nearest
from baton.errors import ModelError
from baton.pins import unreachable
from baton.train import attention
from baton.train.config import AdapterConfig, HubModel, ModelConfig, RandomModel

# ChatML, as Qwen's models use it: what a random model's tokenizer speaks.
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def describe(model: ModelConfig, revision: str = "") -> dict[str, str]:
    """The model as records name it."""
    if isinstance(model, RandomModel):
        return {"source": "random", "name": f"random {model.config['model_type']}"}
    if isinstance(model, HubModel):
        return {"source": model.source, "name": model.name, "revision": revision or model.revision}
    return {"source": "path", "name": model.path}


def locate(model: ModelConfig, *, base_folder: Path, revision: str) -> tuple[str, dict[str, Any]]:
    """What to give to `from_pretrained`: a name or folder, and keyword arguments."""
    if isinstance(model, RandomModel):
        return str(base_folder), {}
    trust = {"trust_remote_code": True} if model.trust_remote_code else {}
    if not isinstance(model, HubModel):
        if not Path(model.path).is_dir():
            raise ModelError(f"model.path: {model.path} is not a folder")
        return model.path, trust
    if model.source == "modelscope":
        try:
            from modelscope import snapshot_download
        except ImportError as error:
            raise ModelError(
                "`source: modelscope` needs the modelscope package: pip install modelscope"
            ) from error
        # ModelScope's own default branch is not called main.
        branch = None if model.revision == "main" else model.revision
        return str(snapshot_download(model.name, revision=branch)), trust
    return model.name, {"revision": revision or model.revision, **trust}


def load_tokenizer(
    model: ModelConfig, *, base_folder: Path, revision: str = ""
) -> PreTrainedTokenizerBase:
    """The model's own tokenizer. Raises `ModelError`."""
    place, options = locate(model, base_folder=base_folder, revision=revision)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise ModelError(_cannot_load(model, place, error)) from error


def context_length(model: ModelConfig, *, base_folder: Path, revision: str = "") -> int | None:
    """The most tokens the model has positions for; None where its config sets no limit."""
    place, options = locate(model, base_folder=base_folder, revision=revision)
    try:
        config = AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise ModelError(_cannot_load(model, place, error)) from error
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(limit) if limit else None


def load_model(
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    base_folder: Path,
    revision: str,
    device: torch.device,
    compute_dtype: torch.dtype,
    packed: bool,
) -> PreTrainedModel:
    """The base model on `device`, frozen unless all of it is to learn; on meta without weights.

    Weights are in `compute_dtype`, or NF4 for QLoRA, or float32 masters for full fine-tuning.
    `packed` chooses the attention of training; otherwise SDPA, for generation.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    attention.register()
    place, options = locate(model, base_folder=base_folder, revision=revision)
    options |= {
        "dtype": torch.float32 if adapter.method == "full" else compute_dtype,
        "attn_implementation": attention.NAME if packed else "sdpa",
    }
    if adapter.method == "qlora":
        from baton.train import quantize

        options["quantization_config"] = quantize.nf4(compute_dtype)
    try:
        loaded = (
            _outline(place, options)
            if device.type == "meta"
            else _with_weights(place, options, device)
        )
    except (OSError, ValueError) as error:
        raise ModelError(_cannot_load(model, place, error)) from error
    except KeyError as error:
        if attention.NAME not in str(error):
            raise
        raise ModelError(
            f"{place}: this architecture does not use transformers' attention interface, so it"
            " cannot be trained packed; choose another model"
        ) from error
    if adapter.method == "qlora":
        quantize.keep_trainable(loaded)
    loaded.requires_grad_(adapter.method == "full")
    if packed and device.type != "meta":
        attention.check_separation(loaded)
    return loaded


def _with_weights(place: str, options: dict[str, Any], device: torch.device) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        place,
        device_map={"": device},
        # A pickle from a store or a hub could run code.
        use_safetensors=True,
        **options,
    )
    return loaded


def _outline(place: str, options: dict[str, Any]) -> PreTrainedModel:
    """The model's modules, with names and shapes of its weights only."""
    made = {key: options.pop(key) for key in ("dtype", "attn_implementation")}
    config = AutoConfig.from_pretrained(place, **options)
    trust = {k: v for k, v in options.items() if k == "trust_remote_code"}
    with torch.device("meta"):
        outline: PreTrainedModel = AutoModelForCausalLM.from_config(config, **made, **trust)
    return outline


def _cannot_load(model: ModelConfig, place: str, error: Exception) -> str:
    if isinstance(model, HubModel) and "connect" in str(error).lower():
        return unreachable(model.name, error)
    return f"{place} cannot be loaded: {_first_line(error)}"


def build_random(model: RandomModel, texts: Iterable[str], folder: Path) -> None:
    """Write a random model and a tokenizer trained on `texts` to `folder`.

    The same config, seed and texts give the same bytes. On a GPU the weights are drawn there,
    which takes seconds for billions of parameters, and are stored in bfloat16.
    """
    tokenizer = train_tokenizer(texts, vocab_size=model.tokenizer_vocab)
    on_gpu = torch.cuda.is_available() and os.environ.get("BATON_DEVICE") != "cpu"
    torch.manual_seed(model.seed)
    try:
        config = _random_config(model, tokenizer)
        with torch.device("cuda" if on_gpu else "cpu"):
            network = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16 if on_gpu else torch.float32
            )
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        # Whatever a configuration class or a layer objects to is in the user's config.
        raise ModelError(f"model.config: {_first_line(error)}") from error
    network.generation_config.eos_token_id = tokenizer.eos_token_id
    network.generation_config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _random_config(model: RandomModel, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    values = dict(model.config)
    kind = values.pop("model_type")
    causal = {name for name, _ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    if kind not in causal:
        advice = nearest(kind, sorted(causal))
        raise ModelError(f"model.config.model_type: no causal language model {kind!r}; {advice}")
    known = AutoConfig.for_model(kind).to_dict().keys()
    for key in values:
        # transformers takes any keyword and says nothing.
        if key not in known:
            raise ModelError(f"model.config.{key}: unknown key; {nearest(key, sorted(known))}")
    values.setdefault("vocab_size", len(tokenizer))
    return AutoConfig.for_model(
        kind,
        **values,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML turns; any text round-trips through it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=_CHATML,
        padding_side="left",
    )


def fingerprint(network: torch.nn.Module) -> str:
    """16 hex digits over names, shapes and a sample of every weight of the base.

    Tells one base from another between legs at the cost of reading 64 values a tensor.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64]
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
