"""vLLM as the engine: in a process of its own, with the model merged into a folder."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from baton.errors import ConfigError, EngineError
from baton.eval.config import Sampling
from baton.generation import vllm_process
from baton.generation.engine import Request
from baton.generation.merged import save_merged

PYTHON = "BATON_VLLM_PYTHON"
_MEMORY = 0.9  # of what the GPU has free
_SECONDS = 0.2  # between two looks at whether to stop
# A launcher's words to the processes of this task, which this one is none of.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def require_vllm() -> None:
    """Raises `ConfigError` where there is no vLLM for `eval.generate.engine: vllm`."""
    python = os.environ.get(PYTHON, "")
    if not python:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "eval.generate.engine: vllm: there is no vllm package in this environment; use the"
                f" image with vLLM (docs/containers.md), name the Python that has it in {PYTHON},"
                " or leave the engine at auto"
            )
        return
    look = "import importlib.util as u, sys; sys.exit(0 if u.find_spec('vllm') else 3)"
    try:
        found = subprocess.run([python, "-c", look], capture_output=True, check=False).returncode
    except OSError as error:
        raise ConfigError(f"{PYTHON}={python}: {error.strerror or error}") from error
    if found:
        raise ConfigError(f"{PYTHON}={python}: this Python has no vllm package")


class Vllm:
    """Writes answers with vLLM, on the GPU of the model or on the CPU.

    The process lives as long as this object: weights that change later are not seen. When this
    process dies, however it dies, so does the other.

    Args:
        model: the model or PEFT model.
        folder: an empty place for a copy of the merged model; it is removed by `close`.
        most_tokens: of prompt and answer together.
        max_new_tokens: of an answer.
        ends: tokens that end an answer; they are part of it.

    Raises:
        ConfigError: there is no vLLM here.
    """

    def __init__(
        self,
        model: Any,
        folder: Path,
        *,
        most_tokens: int,
        max_new_tokens: int,
        ends: Sequence[int],
        sampling: Sampling | None = None,
    ) -> None:
        require_vllm()
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        dtype = save_merged(model, folder / "model")
        self._job = {
            "model": str(folder / "model"),
            "dtype": str(dtype).removeprefix("torch."),
            "parent": os.getpid(),
            "most_tokens": most_tokens,
            "max_new_tokens": max_new_tokens,
            "ends": sorted(ends),
            "sampling": None if sampling is None else asdict(sampling),
            "memory": _share_of_memory(model.device),
        }
        self._device: torch.device = model.device

    def run(
        self, requests: Sequence[Request], should_stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, list[int]]]:
        """Answer every request, as many at a time as vLLM likes.

        Yields:
            The number of a request and its new tokens, as soon as it has ended.

        Raises:
            EngineError: vLLM ended with an error; its last lines are in the message.
        """
        job, said = self._folder / "job.json", self._folder / "vllm.log"
        job.write_text(json.dumps({**self._job, "requests": [asdict(r) for r in requests]}))
        python = os.environ.get(PYTHON) or sys.executable
        with said.open("wb") as log:
            # -P: the script's folder holds a module named vllm, too.
            process = subprocess.Popen(
                [python, "-P", vllm_process.__file__, str(job)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        answered = 0
        try:
            for line in _lines(process, should_stop):
                answer = json.loads(line)
                yield answer["number"], answer["tokens"]
                answered += 1
            if answered < len(requests) and not should_stop():
                process.wait()
                lines = said.read_text(errors="replace").strip().splitlines()
                raise EngineError(
                    f"vLLM answered {answered} of {len(requests)} prompts and ended with status"
                    f" {process.returncode}; its last words:\n" + "\n".join(lines[-12:])
                )
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if k not in _OF_RANKS}
        if self._device.type == "cuda":
            seen = [name for name in own.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            index = self._device.index or 0
            own["CUDA_VISIBLE_DEVICES"] = seen[index] if seen else str(index)
        return own


def _share_of_memory(device: torch.device) -> float | None:
    """What vLLM may take of a GPU's memory, beside the model that stays there; None without one."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return float(round(_MEMORY * free / total, 3))


def _lines(process: subprocess.Popen[bytes], should_stop: Callable[[], bool]) -> Iterator[bytes]:
    """Whole lines of its output until it ends, or until somebody wants to stop."""
    assert process.stdout is not None
    begun = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not should_stop():
            if not selector.select(_SECONDS):
                continue
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                return
            *whole, begun = (begun + piece).split(b"\n")
            yield from whole
