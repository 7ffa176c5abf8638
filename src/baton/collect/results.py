"""`baton collect`: read what an experiment has so far, and write it down for people."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from baton.collect.axes import matrix_of
from baton.collect.bars import draw_methods
from baton.collect.compare import paired_comparisons
from baton.collect.curves import draw_curves
from baton.collect.gather import Result, gather
from baton.collect.lines import draw_scale
from baton.collect.plots import Drawing, Heading
from baton.collect.report import render
from baton.collect.table import Row, csv_bytes, summary_rows
from baton.errors import StoreError
from baton.record import Plan, dump_json
from baton.store.base import Store

SUMMARY = "results_summary.csv"
REPORT = "report.html"

_NO_STATES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What was found and written.

    `rows` are those of the CSV, numbers as numbers. `missing` maps each task without a result
    to the reason; `not_drawn` each plot that was not written to the reason.
    """

    experiment: str
    digest: str
    notice: str
    rows: list[Row]
    missing: dict[str, str]
    files: list[Path]
    not_drawn: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """For `--json`: the same, as one JSON object."""
        return dump_json(
            {
                "notice": self.notice,
                "experiment": self.experiment,
                "digest": self.digest,
                "missing": self.missing,
                "files": [str(path) for path in self.files],
                "not_drawn": self.not_drawn,
                "rows": self.rows,
            }
        )


def collect(
    store: Store, plan: Plan, out: Path, *, states: Mapping[str, str] = _NO_STATES
) -> Collected:
    """Write CSV, plots and page of `plan` to the folder `out`; the store is only read.

    Names in `store` are relative to the experiment's folder (`tasks/<task>/eval/eval.json`).
    `states` are what a launcher knows of tasks, such as `queued`. A missing or damaged record
    is listed with its reason and stops nothing. A plot with nothing to show is not written,
    and an older one of its name is removed.

    Raises:
        StoreError: `out` cannot be written.
    """
    with _collector_paused():
        return _collect(store, plan, out, states)


def _collect(store: Store, plan: Plan, out: Path, states: Mapping[str, str]) -> Collected:
    results = gather(store, plan, states)
    matrix = matrix_of(plan.tasks)
    notice = _notice(plan, results)
    heading = Heading(experiment=plan.experiment, digest=plan.digest, notice=notice)
    drawings = {
        "data_scale_comparison.png": draw_scale(heading, matrix, results),
        "method_comparison.png": draw_methods(heading, matrix, results),
        "loss_curves.png": draw_curves(heading, results),
    }
    rows = summary_rows(plan, results)
    comparisons = paired_comparisons(store, matrix, results)
    page = render(plan, results, comparisons, drawings, notice=notice, summary=SUMMARY)
    files = _write_all(
        out,
        {
            SUMMARY: csv_bytes(rows),
            **{name: drawing.png for name, drawing in drawings.items()},
            REPORT: page,
        },
    )
    return Collected(
        experiment=plan.experiment,
        digest=plan.digest,
        notice=notice,
        rows=rows,
        missing={result.name: result.reason for result in results if result.record is None},
        files=files,
        not_drawn=_not_drawn(drawings),
    )


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Thousands of records are millions of objects without a cycle: looking costs a quarter."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _notice(plan: Plan, results: list[Result]) -> str:
    """Every different notice once; with the tasks it is about if it is not about all."""
    tasks: dict[str, list[str]] = {}
    for result in results:
        if result.record and result.record.notice:
            tasks.setdefault(result.record.notice, []).append(result.name)
    found = sum(result.record is not None for result in results)
    parts = [plan.notice] if plan.notice else []
    for notice, names in tasks.items():
        if notice == plan.notice:
            continue
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        about = "" if len(names) == found else f" ({', '.join(names[:3])}{more})"
        parts.append(f"{notice}{about}")
    return "; ".join(parts)


def _not_drawn(drawings: Mapping[str, Drawing]) -> dict[str, str]:
    return {name: drawing.reason for name, drawing in drawings.items() if drawing.png is None}


def _write_all(out: Path, contents: Mapping[str, bytes | None]) -> list[Path]:
    """Write each file whole or not at all; None removes what an earlier run left."""
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if content is None:
                (out / name).unlink(missing_ok=True)
            else:
                _write(out / name, content)
                written.append(out / name)
    except OSError as error:
        raise StoreError(
            f"writing results to {out}: {error.strerror or error}; choose another folder with --out"
        ) from error
    return written


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
