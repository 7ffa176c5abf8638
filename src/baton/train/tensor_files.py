"""Writing safetensors files, with the errors that any other file has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, header: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; a full disk is an `OSError`, as for any other file.

    `header` may have one entry: of several the order would be another at every save.
    """
    try:
        save_file(tensors, path, dict(header) if header else None)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error
