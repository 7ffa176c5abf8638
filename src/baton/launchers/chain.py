"""The jobs of one submission: a single array, or one a stage where the site says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.config.slurm_site import SlurmSite
from baton.errors import ConfigError
from baton.launchers.base import Request
from baton.launchers.batch import COLLECT, Batch
from baton.launchers.submissions import Submission, Submissions, SubmittedJob
from baton.pipelines import PIPELINES, Pipeline
from baton.runner import done_marker, task_store


@dataclass(frozen=True)
class Chain:
    """What is to be submitted: the record of it, and a batch for each of its jobs, in order."""

    submission: Submission
    batches: Sequence[Batch]

    def waits_for(self, place: int, number: str) -> str | None:
        """The dependency of one job on the job before it, which has this number."""
        if place == 0:
            return None
        # aftercorr: each element waits for the same element alone. The report is for what is
        # there, whatever became of the tasks.
        kind = "afterany" if self.batches[place].stage == COLLECT else "aftercorr"
        return f"{kind}:{number}"

    def cost(self) -> str:
        """What the first leg of everything asks for at most."""
        hours = sum(batch.gpu_hours for batch in self.batches)
        tasks = len(self.submission.tasks)
        text = f"{tasks} task{'' if tasks == 1 else 's'}, at most {hours:,.1f} GPU-hours"
        prices = [batch.price for batch in self.batches if batch.price is not None]
        if prices:
            text += f" ({sum(prices):,.2f} at the site's price)"
        return f"{text}; as much again for each further leg"


def plan_chain(
    request: Request, site: SlurmSite, submissions: Submissions, home: Path, most: int | None
) -> Chain:
    """Cut the tasks' stages into jobs; `most` tasks at once, if the caller has a wish.

    A stage gets a job of its own when the experiment (`split`) or the site (`stages`) says so.
    """
    number = submissions.next_number()
    folder = submissions.folder(number)
    prefix = f"{request.plan.experiment}/{request.plan.digest}"
    pipeline = PIPELINES[request.plan.pipeline]()
    parts = _parts(request, site, pipeline) + ([(COLLECT,)] if site.collect else [])
    cpu_stages = (*pipeline.cpu_stages, COLLECT)
    # A job for the whole of a task runs it to its end, whichever stage that is.
    stages = ["" if part == pipeline.stage_names else part[-1] for part in parts]
    batches = [
        Batch(
            site=_site_of(part, site, cpu_stages),
            name=submissions.job_name(prefix, number, stage),
            stage=stage,
            elements=1 if stage == COLLECT else len(request.tasks),
            max_parallel=most,
            plan_path=request.plan_path,
            store_url=request.store_url,
            tasks_file=folder / "tasks.txt",
            folder=folder,
            home=home,
        )
        for part, stage in zip(parts, stages, strict=True)
    ]
    jobs = [SubmittedJob(name=batch.name, stage=batch.stage) for batch in batches]
    submitted = submissions.now()
    record = Submission(number=number, submitted=submitted, tasks=list(request.tasks), jobs=jobs)
    return Chain(record, batches)


def _site_of(part: Sequence[str], site: SlurmSite, cpu_stages: Sequence[str]) -> SlurmSite:
    """The site as the job of these stages sees it."""
    if part[-1] in site.stages:
        return site.for_stage(part[-1])
    return site.without_gpu() if set(part) <= set(cpu_stages) else site


def _parts(request: Request, site: SlurmSite, pipeline: Pipeline) -> list[tuple[str, ...]]:
    """The stages of each job, in order."""
    names = pipeline.stage_names
    unknown = [stage for stage in site.stages if stage not in (*names, COLLECT)]
    if unknown:
        raise ConfigError(
            f"stages.{unknown[0]}: {request.plan.pipeline} has the stages {', '.join(names)}"
        )
    own = {*site.stages, *request.plan.split}
    parts: list[tuple[str, ...]] = []
    for stage in names:
        if parts and stage not in own and parts[-1][-1] not in own:
            parts[-1] += (stage,)
        else:
            parts.append((stage,))
    stores = [task_store(request.store_root, request.plan, task) for task in request.tasks]

    def is_behind(part: Sequence[str]) -> bool:
        return all(store.path(done_marker(part[-1])).exists() for store in stores)

    # What every task has behind it needs no job any more.
    while len(parts) > 1 and is_behind(parts[0]):
        parts.pop(0)
    return parts
