"""What training made, as one folder that other tools load: `train/final`, below its stage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from baton.record import dump_json
from baton.stage import Leg
from baton.train.adapters import FOLDER as ADAPTER
from baton.train.adapters import WEIGHTS
from baton.train.learner import Learner
from baton.train.shard_files import place_tensors
from baton.train.state import MODEL
from baton.tuning.best import TRAIN, fetch_best
from baton.tuning.model import Model

# Written last: where it is, everything is.
TASK = "task.json"


def write_final(
    leg: Leg, learner: Learner, model: Model, *, method: str, stage: str = TRAIN
) -> None:
    """Put the best weights, the tokenizer and the resolved configuration below `<stage>/final`.

    An adapter is a folder for `PeftModel.from_pretrained`, a fully trained model one for
    `from_pretrained` of its own class. `task.json` says what it is and where it comes from.
    """

    def fill(best: Path, final: Path) -> None:
        if method == "full":
            learner.network.config.save_pretrained(final)
            learner.network.generation_config.save_pretrained(final)
            place_tensors(best, MODEL, final / MODEL)
        else:
            shutil.copytree(best / ADAPTER, final, dirs_exist_ok=True)
            if not (final / WEIGHTS).exists():
                place_tensors(best, f"{ADAPTER}/{WEIGHTS}", final / WEIGHTS)
        model.tokenizer().save_pretrained(final)

    place_final(leg, model, fill, method=method, stage=stage)


def place_final(
    leg: Leg, model: Model, fill: Callable[[Path, Path], None], *, method: str, stage: str = TRAIN
) -> None:
    """Store what `fill` makes of the best checkpoint of `stage` as `<stage>/final`.

    `fill` gets the folder of that checkpoint and the empty one that becomes final.
    """
    checkpoints = leg.checkpoints(f"{stage}/checkpoints")
    best, final = leg.folder / ".best-final", leg.folder / ".final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    step = fetch_best(checkpoints, leg.store, best, task=leg.task.name, stage=stage)
    fill(best, final)
    leg.check_fence()
    place = f"{stage}/final"
    for name in list(leg.store.names(place)):
        leg.store.delete(name)
    for path in sorted(path for path in final.rglob("*") if path.is_file()):
        leg.store.upload(path, f"{place}/{path.relative_to(final).as_posix()}")
    about = {
        "notice": leg.notice,
        "experiment": leg.plan.experiment,
        "digest": leg.plan.digest,
        "task": leg.task.name,
        "pipeline": leg.plan.pipeline,
        "model": model.description(),
        "method": method,
        "step": step,
        "config": leg.task.config,
    }
    leg.store.write(f"{place}/{TASK}", dump_json(about))
    shutil.rmtree(best)
    shutil.rmtree(final)
