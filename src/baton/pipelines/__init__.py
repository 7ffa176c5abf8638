"""The table of pipelines: what a `pipeline:` line in an experiment may name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baton.stage import Leg, Outcome, Stage


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A pipeline, loaded in two steps: its configuration without torch, its stages with it.

    Attributes:
        config: the dataclass that a task's configuration decodes to.
        stage_names: in order; `load_stages` returns the stages of these names.
        load_retrain: returns what trains a leg's newest checkpoint on to a given step, for
            `verify-resume`.
        cpu_stages: those that need no GPU; split off, their jobs ask for none.
    """

    name: str
    config: type[Any]
    stage_names: tuple[str, ...]
    load_stages: Callable[[], tuple[Stage, ...]]
    load_retrain: Callable[[], Callable[[Leg, int], Outcome]]
    cpu_stages: tuple[str, ...] = ()


def _medical_qa() -> Pipeline:
    from baton.pipelines.medical_qa.config import MedicalQA

    def load() -> tuple[Stage, ...]:
        from baton.pipelines.medical_qa.stages import STAGES

        return STAGES

    def retrain() -> Callable[[Leg, int], Outcome]:
        from baton.pipelines.medical_qa.training import build_loop

        return lambda leg, step: build_loop(leg, stop_at=step)[0].run()

    return Pipeline(
        name="medical_qa",
        config=MedicalQA,
        stage_names=("data", "train", "eval"),
        load_stages=load,
        load_retrain=retrain,
        cpu_stages=("data",),
    )


PIPELINES: dict[str, Callable[[], Pipeline]] = {"medical_qa": _medical_qa}
