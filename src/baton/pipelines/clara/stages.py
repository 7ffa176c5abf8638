"""The five stages of a task: data, three that train, eval."""

from __future__ import annotations

from baton.pipelines.clara.data import prepare
from baton.pipelines.clara.evaluate import evaluate
from baton.pipelines.clara.training import stage_of
from baton.stage import Stage

STAGES = (
    Stage(name="data", run=prepare, all_peers=False),
    Stage(name="stage1", run=stage_of("stage1")),
    Stage(name="stage2", run=stage_of("stage2")),
    Stage(name="stage3", run=stage_of("stage3")),
    Stage(name="eval", run=evaluate),
)
