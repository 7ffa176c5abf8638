"""`report.html`: one page that opens anywhere, from disk, with nothing but itself."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

import baton
from baton.collect.axes import flattened
from baton.collect.compare import SEED, Comparisons, Difference, marks
from baton.collect.gather import Result
from baton.collect.measures import label, main_scores
from baton.collect.plots import Drawing
from baton.collect.table import GIB, MIB, score_columns
from baton.eval.bootstrap import RESAMPLES
from baton.record import LegRecord, Plan, ScoreEntry

# A page of more stops being a page; the CSV has every task.
TASKS = 300
SAMPLES = 5
TASKS_PER_SAMPLE = 12
# Up to so many tasks stand side by side, scores and settings down the page.
SIDE_BY_SIDE = 8


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: its text, an interval under it, `best` or `near`, and what sorting goes by."""

    text: str
    below: str = ""
    mark: str = ""
    sort: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A header, with smaller lines under each name, and rows whose first cell is their name."""

    header: list[Cell]
    rows: list[list[Cell]]
    numeric: bool = True

    @property
    def turned(self) -> Table:
        """Rows for columns; the name of the first column stays in its corner."""
        columns = list(zip(*self.rows, strict=True))
        head = [self.header[0], *(Cell(text=cell.text, below=cell.below) for cell in columns[0])]
        rows = [[name, *cells] for name, cells in zip(self.header[1:], columns[1:], strict=True)]
        return Table(header=head, rows=rows, numeric=self.numeric)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Key-value pairs of several tasks: those that all share, and the others per task."""

    title: str
    common: dict[str, str] = field(default_factory=dict)
    differing: Table | None = None


def render(
    plan: Plan,
    results: Sequence[Result],
    comparisons: Comparisons,
    drawings: Mapping[str, Drawing],
    *,
    notice: str,
    summary: str,
) -> bytes:
    """The page as UTF-8. Every text from models, data and configurations is escaped."""
    found = [result for result in results if result.record]
    missing = [result for result in results if not result.record]
    script = _resource("report.js.jinja")
    context = {
        "plan": plan,
        "notice": notice,
        "css": Markup(_resource("report.css")),
        "script": Markup(script),
        # The page's own script and no other: text that escaped escaping would still not run.
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "found": len(found),
        "total": len(results),
        "missing": missing[:TASKS],
        "missing_left_out": len(missing[TASKS:]),
        "tasks_left_out": len(found[TASKS:]),
        "overview": _overview(found[:TASKS]) if found else None,
        "scores": _scores(found[:TASKS]) if found else None,
        "conventions": list(score_columns(results).values()),
        "test_rows": sorted({score.n for r in found if r.record for score in r.record.scores}),
        "main_differences": _main_differences(comparisons, found),
        "all_differences": comparisons.differences,
        "refused": comparisons.refused,
        "pairs_left_out": comparisons.left_out,
        "resamples": RESAMPLES,
        "seed": SEED,
        "drawings": [
            (name, drawing, base64.b64encode(drawing.png or b"").decode())
            for name, drawing in drawings.items()
        ],
        "samples": _samples(found),
        "samples_left_out": len(found[TASKS_PER_SAMPLE:]),
        "legs": [result for result in results[:TASKS] if result.legs],
        "settings": _all_settings(plan, found[:TASKS]),
        "summary": summary,
        "baton_version": baton.__version__,
        "experiment_word": shlex.quote(plan.experiment),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("baton.collect", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"label": label, "score": score_text, "signed": _signed}
    environment.filters |= {"interval": _interval, "lasted": _lasted, "ending": _ending}
    environment.filters["moment"] = _moment
    return environment.get_template("report.html.jinja").render(context).encode()


def score_text(value: float, entry: ScoreEntry) -> str:
    """Four decimals of a score up to 1, two of one up to 100."""
    return f"{value:.{4 if entry.scale <= 1 else 2}f}"


def _overview(found: Sequence[Result]) -> Table:
    """A row a task: labels, main scores, cost."""
    axes = list(dict.fromkeys(name for result in found for name in result.task.labels))
    mains = main_scores(found)
    header = ["task", *axes, *(f"{entry.name}" for entry in mains)]
    below = ["", *("" for _ in axes), *(f"{entry.tokenizer}, {entry.library}" for entry in mains)]
    figures: list[tuple[str, str, Callable[[Result], Cell]]] = [
        ("dev loss", "lower is better", _dev_loss),
        ("training", "all legs", lambda r: _duration(_training(r).seconds)),
        ("legs", "", lambda r: _number(_training(r).legs, ",d")),
        ("peak memory", "GiB, training", lambda r: _size(_training(r).peak_gpu_memory_bytes, GIB)),
        ("training speed", "tokens/s", lambda r: _number(_training(r).tokens_per_s, ",.0f")),
        ("adapter", "MiB", lambda r: _size(_training(r).adapter_bytes, MIB)),
        ("generation", "new tokens/s", lambda r: _number(_speed(r), ",.0f")),
    ]
    names = [Cell(text=text, below=small) for text, small in zip(header, below, strict=True)]
    names += [Cell(text=text, below=small) for text, small, _ in figures]
    columns = [
        [Cell(text=result.name) for result in found],
        *([Cell(text=result.task.labels.get(axis, "")) for result in found] for axis in axes),
        *(_score_cells(entry.column, found) for entry in mains),
        *(_lowest_marked([of(result) for result in found], text) for text, _, of in figures),
    ]
    return Table(header=names, rows=[list(row) for row in zip(*columns, strict=True)])


def _lowest_marked(cells: list[Cell], name: str) -> list[Cell]:
    """Mark the lowest dev loss. Cost is not marked: less work is not better work."""
    known = [cell.sort for cell in cells if cell.sort is not None]
    if name != "dev loss" or len(known) < 2:
        return cells
    return [
        Cell(text=cell.text, sort=cell.sort, mark="best" if cell.sort == min(known) else "")
        for cell in cells
    ]


def _scores(found: Sequence[Result]) -> Table:
    """Every score of every task with its interval; scores down the page if tasks are few."""
    columns = score_columns(found)
    header = [Cell(text="task" if len(found) > SIDE_BY_SIDE else "score")]
    header += [
        Cell(text=entry.name, below=f"{entry.tokenizer}, {entry.library}")
        for entry in columns.values()
    ]
    cells = [_score_cells(column, found) for column in columns]
    rows = (
        [
            [Cell(text=result.name), *row]
            for result, row in zip(found, zip(*cells, strict=True), strict=True)
        ]
        if cells
        else [[Cell(text=result.name)] for result in found]
    )
    table = Table(header=header, rows=rows)
    return table if len(found) > SIDE_BY_SIDE else table.turned


def _score_cells(column: str, found: Sequence[Result]) -> list[Cell]:
    entries = [_entry(result, column) for result in found]
    return [
        Cell(
            text=score_text(entry.value, entry),
            below=f"{score_text(entry.low, entry)} to {score_text(entry.high, entry)}",
            mark=mark,
            sort=entry.value,
        )
        if entry
        else Cell(text="–")
        for entry, mark in zip(entries, marks(entries), strict=True)
    ]


def _entry(result: Result, column: str) -> ScoreEntry | None:
    for entry in result.record.scores if result.record else []:
        if entry.column == column:
            return entry
    return None


def _main_differences(comparisons: Comparisons, found: Sequence[Result]) -> list[Difference]:
    mains = {entry.column for entry in main_scores(found)}
    return [each for each in comparisons.differences if each.entry.column in mains]


def _samples(found: Sequence[Result]) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(prompt, reference, [(task, prediction)]) of the first prompts, side by side."""
    together: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for result in found[:TASKS_PER_SAMPLE]:
        for sample in result.record.samples if result.record else []:
            key = (sample.prompt, sample.reference)
            together.setdefault(key, []).append((result.name, sample.prediction))
    # Prompts that most tasks answered first: those can be compared.
    ordered = sorted(together.items(), key=lambda item: -len(item[1]))
    return [(prompt, reference, texts) for (prompt, reference), texts in ordered[:SAMPLES]]


def _all_settings(plan: Plan, found: Sequence[Result]) -> list[Settings]:
    records = {result.name: result.record for result in found if result.record}
    configs = {task.name: task.config for task in plan.tasks}
    return [
        settings
        for settings in (
            _settings("Configuration", configs),
            _settings("Model", {name: record.model for name, record in records.items()}),
            _settings("Data", {name: record.data for name, record in records.items()}),
            _settings("Environment", {name: r.environment for name, r in records.items()}),
        )
        if settings.common or settings.differing
    ]


def _settings(title: str, configs: Mapping[str, Mapping[str, Any]]) -> Settings:
    flat = {name: flattened(config) if config else {} for name, config in configs.items()}
    texts = {name: {k: _plain(v) for k, v in leaves.items()} for name, leaves in flat.items()}
    keys = dict.fromkeys(key for leaves in texts.values() for key in leaves)
    values = {key: {leaves.get(key) for leaves in texts.values()} for key in keys}
    common = {key: next(iter(found)) or "" for key, found in values.items() if len(found) == 1}
    differing = [key for key in keys if key not in common]
    if not differing:
        return Settings(title=title, common=common)
    shown = list(texts.items())[:TASKS]
    table = Table(
        header=[Cell(text=text) for text in ("", *differing)],
        rows=[
            [Cell(text=name), *(Cell(text=leaves.get(key, "–")) for key in differing)]
            for name, leaves in shown
        ],
        numeric=False,
    )
    return Settings(
        title=title,
        common=common,
        differing=table.turned if len(shown) <= SIDE_BY_SIDE else table,
    )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _training(result: Result) -> Any:
    assert result.record is not None  # asked of tasks with a result only
    return result.record.training


def _speed(result: Result) -> float | None:
    return result.record.generation.new_tokens_per_s if result.record else None


def _dev_loss(result: Result) -> Cell:
    return _number(_training(result).dev_loss, ".4f")


def _number(value: float | None, form: str) -> Cell:
    return Cell(text="–") if value is None else Cell(text=format(value, form), sort=value)


def _size(size_bytes: int | None, unit: int) -> Cell:
    return _number(None if size_bytes is None else size_bytes / unit, ",.2f")


def _duration(seconds: float) -> Cell:
    return Cell(text=_time(seconds), sort=seconds)


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def _signed(value: float, entry: ScoreEntry) -> str:
    decimals = 4 if entry.scale <= 1 else 2
    # Adding 0 turns -0.0 into 0.0: what rounds to nothing has no sign that means anything.
    return f"{round(value, decimals) + 0.0:+.{decimals}f}".replace("-", "−")


def _interval(difference: Difference) -> str:
    ends = (difference.interval.low, difference.interval.high)
    return " to ".join(_signed(end, difference.entry) for end in ends)


def _moment(text: str) -> str:
    """`2026-05-01 07:59 UTC`; a time that is written otherwise stays as it is."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    if moment.tzinfo is None:
        return text
    return f"{moment.astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _lasted(leg: LegRecord) -> str:
    if leg.ended is None:
        return ""
    try:
        start, end = map(datetime.datetime.fromisoformat, (leg.started, leg.ended))
        return _time((end - start).total_seconds())
    except (ValueError, TypeError):
        return ""


def _ending(legs: Iterable[LegRecord]) -> str:
    """`3 legs: 2 handed over, 1 finished`."""
    legs = list(legs)
    counts: dict[str, int] = {}
    for leg in legs:
        counts[leg.state] = counts.get(leg.state, 0) + 1
    states = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in counts.items())
    return f"{len(legs)} leg{'s' if len(legs) != 1 else ''}: {states}"


def _resource(name: str) -> str:
    return (resources.files("baton.collect") / name).read_text(encoding="utf-8")
