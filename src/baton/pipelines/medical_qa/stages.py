"""The three stages of a task: data, train, eval."""

from __future__ import annotations

from baton.pipelines.medical_qa.data import prepare
from baton.pipelines.medical_qa.evaluate import evaluate
from baton.stage import Stage
from baton.tuning.training import train

STAGES = (
    Stage(name="data", run=prepare, all_peers=False),
    Stage(name="train", run=train),
    Stage(name="eval", run=evaluate),
)
