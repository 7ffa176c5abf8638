"""The stages of a task, in order."""

from __future__ import annotations

from baton.pipelines.questions_gen.data import prepare
from baton.pipelines.questions_gen.evaluate import evaluate
from baton.pipelines.questions_gen.propose import propose
from baton.pipelines.questions_gen.teach import teach
from baton.pipelines.questions_gen.training import train_distill, train_grpo, train_sft
from baton.stage import Stage

STAGES = (
    Stage(name="data", run=prepare, all_peers=False),
    Stage(name="sft", run=train_sft),
    Stage(name="grpo", run=train_grpo),
    Stage(name="propose", run=propose),
    Stage(name="teach", run=teach, all_peers=False),
    Stage(name="distill", run=train_distill),
    Stage(name="eval", run=evaluate),
)
