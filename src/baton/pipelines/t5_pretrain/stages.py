"""The three stages of a task: data, train, eval."""

from __future__ import annotations

from baton.pipelines.t5_pretrain.data import prepare
from baton.pipelines.t5_pretrain.evaluate import evaluate
from baton.pipelines.t5_pretrain.training import train
from baton.stage import Stage

STAGES = (
    Stage(name="data", run=prepare, all_peers=False),
    Stage(name="train", run=train),
    Stage(name="eval", run=evaluate),
)
