"""Load what a clara task exported, in any process: a folder, a zip file or a Hub repository.

clara = load("exported.zip")
print(clara.answer("When was Ardenford founded?", ["a document", "another document"]))
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from baton.errors import ModelError
from baton.eval.config import GenerateConfig
from baton.pipelines.clara.final import ABOUT
from baton.pipelines.clara.model import build
from baton.pipelines.clara.responder import Asked, Responder
from baton.stage import Alone
from baton.train.base import load_tokenizer
from baton.train.config import AdapterConfig, HubModel, ModelConfig, PathModel
from baton.train.precision import Precision
from baton.train.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Clara:
    """A loaded model.

    Attributes:
        about: `clara.json`: base, compress rate, top_k, lengths.
    """

    about: dict[str, Any]
    responder: Responder
    # What a zip file was unpacked to lives as long as the model.
    _unpacked: Any = field(default=None, repr=False)

    def compress(self, documents: Sequence[str]) -> torch.Tensor:
        """Documents as vectors: `(documents, doc_max_length // compress_rate, width)`."""
        return self.responder.compress(documents)

    def retrieve(self, question: str, documents: Sequence[str]) -> list[int]:
        """Positions of the top_k documents for a question, best first.

        Raises:
            ModelError: stage 3, which trains the retriever, was not part of the task.
        """
        if not self.responder.retrieves:
            raise ModelError("this model was exported after stage 2: it has no query reasoner")
        return self.responder.retrieve(question, self.compress(documents))

    def answer(
        self,
        question: str,
        documents: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The greedy answer from documents of any length; long ones are cut and chosen from.

        Raises:
            DataError: no documents, or more than can be read without a retriever.
        """
        pieces = [piece for text in documents for piece in self.responder.chunks(text)]
        config = GenerateConfig(max_new_tokens=max_new_tokens or self.about["max_new_tokens"])
        asked = Asked(question, tuple(dict.fromkeys(pieces)))
        answers, _ = self.responder.answer([asked], config, on_text=on_text)
        assert answers is not None, "nobody asked to stop"
        return answers.texts[0]


def load(
    place: str | Path,
    *,
    subfolder: str = "",
    revision: str | None = None,
    base: str | None = None,
    device: torch.device | None = None,
) -> Clara:
    """Load an exported model.

    Args:
        place: a folder, a `.zip` file, or a Hub repository as `user/name`.
        subfolder: where in it the model lies.
        revision: of the repository.
        base: a folder with the base model, where it lies elsewhere by now.
        device: the first GPU if there is one, unless given.

    Raises:
        ModelError: it is no such model, or its base cannot be loaded.
        DamagedError: weights are missing or of another shape.
    """
    unpacked, folder = _folder_of(place, revision, subfolder)
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{place}: no clara model is there ({error})") from error
    device = device or Ranks.of(Alone()).device
    model = _base_of(about, folder, base)
    adapter = AdapterConfig(**about["adapter"])
    precision = Precision.choose("auto", device)
    learner = build(
        model,
        adapter,
        load_tokenizer(model, base_folder=folder, revision=about["base"].get("revision", "")),
        stage=about["stage"],
        vectors=about["doc_max_length"] // about["compress_rate"],
        encoder_tokens=about["doc_max_length"] + 3,
        base_folder=folder,
        revision=about["base"].get("revision", ""),
        device=device,
        compute_dtype=precision.dtype,
        seed=0,
    )
    learner.weights.load(folder)
    responder = Responder(
        learner,
        top_k=about["top_k"],
        retrieves=about["stage"] == "stage3",
        precision=precision,
    )
    return Clara(about=about, responder=responder, _unpacked=unpacked)


def _folder_of(
    place: str | Path, revision: str | None, subfolder: str
) -> tuple[tempfile.TemporaryDirectory[str] | None, Path]:
    path = Path(place)
    if path.is_dir():
        return None, path / subfolder
    if path.is_file() and path.suffix.lower() == ".zip":
        unpacked = tempfile.TemporaryDirectory(prefix="baton-clara-")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(unpacked.name)
        return unpacked, Path(unpacked.name) / subfolder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = [f"{subfolder.strip('/')}/*"] if subfolder else None
        found = snapshot_download(str(place), revision=revision, allow_patterns=patterns)
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{place}: no folder, no zip file, and no repository that can be read ({error})"
        ) from error
    return None, Path(found) / subfolder


def _base_of(about: dict[str, Any], folder: Path, base: str | None) -> ModelConfig:
    said = about["base"]
    if base is not None:
        return PathModel(source="path", path=base)
    if said["source"] == "random":
        return PathModel(source="path", path=str(folder / "base"))
    if said["source"] == "path":
        return PathModel(source="path", path=said["name"])
    return HubModel(
        source=said["source"], name=said["name"], revision=said.get("revision") or "main"
    )
