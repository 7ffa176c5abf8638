"""The curves of a run: one JSON line a logged step, TensorBoard events beside it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.errors import ConfigError

FILE = "metrics.jsonl"


class Metrics:
    """Appends to `metrics.jsonl` in `folder`; a resumed run drops what lies past its step.

    The file holds values that depend on the plan alone (loss, learning rate, gradient norm,
    dev loss, samples, tokens), so two runs of one plan write the same bytes. What a machine
    measured (tokens a second, memory) goes to TensorBoard and W&B only.
    """

    def __init__(self, folder: Path, *, run_name: str, wandb_project: str | None = None) -> None:
        self.path = folder / FILE
        self._run_name = run_name
        self._wandb_project = wandb_project
        self._file: Any = None
        self._board: Any = None
        self._wandb: Any = None

    def resume(self, step: int, *, dev_pending: bool = False) -> None:
        """Open for writing after `step`; later lines, and half a line, are removed."""
        from torch.utils.tensorboard import SummaryWriter

        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_lines(self.path) if _is_before(line, step, dev_pending)]
        beside = self.path.with_name(f"{FILE}.part")
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)
        # purge_step hides the events of steps that this leg does again.
        self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1)
        if self._wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise ConfigError(
                    "train.wandb_project needs the wandb package: pip install 'baton-jobs[wandb]'"
                ) from error
            # W&B takes no slash in an id; the same id joins the legs of a task in one run.
            name = self._run_name.replace("/", "-")
            self._wandb = wandb.init(
                project=self._wandb_project,
                name=name,
                id=name,
                resume="allow",
                dir=str(self.path.parent),
            )

    def write(self, step: int, values: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """One line of exact values; `measured` goes to the trackers only."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        # A line that a kill leaves in a buffer would be a gap that no resume notices.
        self._file.flush()
        everything = {**values, **measured}
        for name, value in everything.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(everything, step=step)

    def sync(self) -> None:
        """Bring every line to disk; called before the checkpoint that follows them."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a half-written last one is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # A machine that dies may leave a block of zeros, or half a line before a whole one.
        with contextlib.suppress(json.JSONDecodeError):
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return lines


def _is_before(line: Mapping[str, Any], step: int, dev_pending: bool) -> bool:
    if line["step"] == step and "dev_loss" in line:
        return not dev_pending
    return bool(line["step"] <= step)
