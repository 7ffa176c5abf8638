"""`collect` through its public door: a small experiment in a folder, and what comes out."""

import csv
import dataclasses
import html
import html.parser
import io
import itertools
import json
import warnings

import numpy as np
import pytest
from PIL import Image

from baton.collect import collect
from baton.collect.axes import matrix_of
from baton.collect.compare import NO_DIFFERENCE, marks, paired_comparisons
from baton.collect.figure import style
from baton.collect.gather import gather
from baton.collect.plots import plain_powers
from baton.collect.quick import read_eval_record
from baton.collect.report import render
from baton.collect.table import csv_bytes, summary_rows
from baton.errors import BatonError, StoreError
from baton.eval.bleu import paired_corpus_bleu_difference
from baton.eval.bootstrap import paired_difference
from baton.record import (
    EvalRecord,
    GenerationFigures,
    LegRecord,
    PerSample,
    Plan,
    Runner,
    Sample,
    ScoreEntry,
    TaskPlan,
    TrainingFigures,
)
from baton.store.local import LocalStore

NASTY = """<script>alert("x")</script> & 'q' <b>"""
PLOTS = ["data_scale_comparison.png", "method_comparison.png", "loss_curves.png"]
METHODS = {"method": ["lora", "qlora"]}
MATRIX = {"method": ["lora", "qlora"], "rows": ["20k", "50k"]}


class Lab:
    """An experiment in a folder, to be filled task by task."""

    def __init__(self, folder, axes, *, experiment="demo", notice="", config=None):
        self.store = LocalStore(folder / "store")
        self.out = folder / "results"
        tasks = [
            TaskPlan(
                name="_".join(combination) or "only",
                labels=dict(zip(axes, combination, strict=True)),
                config=config or {"train": {"learning_rate": 1e-4, "epochs": 3}},
            )
            for combination in itertools.product(*axes.values())
        ]
        self.plan = Plan(
            notice=notice,
            experiment=experiment,
            pipeline="anything",
            digest="3f9c1a2b",
            tasks=tasks,
            created="2026-05-01T07:59:00.000+00:00",
            baton_version="0.1.0",
        )

    def put(self, task, name, data):
        self.store.write(f"tasks/{task}/{name}", data)

    def finish(self, task, scores=None, **changes):
        self.put(task, "eval/eval.json", self.record(task, scores, **changes).to_json())

    def finish_all(self, **changes):
        for index, task in enumerate(self.plan.tasks):
            self.finish(task.name, [entry(0.25 + 0.01 * index)], **changes)

    def record(self, task, scores=None, **changes):
        record = EvalRecord(
            experiment=self.plan.experiment,
            digest=self.plan.digest,
            task=task,
            pipeline="anything",
            labels=self.plan.task(task).labels,
            model={"repo": "tiny"},
            data={"rows": 10},
            scores=[entry(0.25)] if scores is None else scores,
            training=TrainingFigures(
                started="2026-05-01T08:00:00.000+00:00",
                ended="2026-05-01T09:00:00.000+00:00",
                legs=2,
                seconds=1800.5,
                steps=100,
                best_step=80,
                dev_loss=1.25,
                samples=1600,
                tokens=160_000,
                labelled_tokens=60_000,
                samples_per_s=0.5,
                tokens_per_s=88.25,
                peak_gpu_memory_bytes=3 * 2**29,
                trainable_parameters=1000,
                total_parameters=50_000,
                adapter_bytes=2**21,
            ),
            generation=GenerationFigures(
                seconds=10.0,
                samples=40,
                new_tokens=400,
                samples_per_s=4.0,
                new_tokens_per_s=40.0,
                decoding="greedy",
                max_new_tokens=16,
                batch_size=8,
                peak_gpu_memory_bytes=None,
            ),
            loss_curve=[],
            dev_curve=[],
            samples=[Sample(prompt="Why?", reference="Because.", prediction="Who knows.")],
            config=self.plan.task(task).config,
            environment={"torch": "2.13"},
        )
        return dataclasses.replace(record, **changes)

    def leg(self, task, number, state, **changes):
        record = LegRecord(
            task=task,
            number=number,
            state=state,
            runner=Runner(host="n", pid=1, started_ticks=1, boot="b", pid_namespace=""),
            started="2026-05-01T08:00:00.000+00:00",
            ended=None if state == "active" else "2026-05-01T08:30:00.000+00:00",
            stage="train",
            position=[0],
        )
        record = dataclasses.replace(record, **changes)
        self.put(task, f"legs/{number:03d}.json", record.to_json())

    def collect(self, **states):
        return collect(self.store, self.plan, self.out, states=states)

    def gather(self, **states):
        return gather(self.store, self.plan, states)

    def csv(self, **states):
        return csv_bytes(summary_rows(self.plan, self.gather(**states))).decode()

    def compare(self):
        return paired_comparisons(self.store, matrix_of(self.plan.tasks), self.gather())

    def page(self):
        """The page without plots, which are most of the time it takes."""
        page = render(
            self.plan, self.gather(), self.compare(), {}, notice=self.plan.notice, summary="x.csv"
        )
        return page.decode()

    def text(self, name="report.html"):
        return (self.out / name).read_text(encoding="utf-8")


CURVES = {
    "loss_curve": [[float(step), 2 + 1 / step] for step in range(1, 100, 3)],
    "dev_curve": [[40.0, 1.5], [80.0, 1.25]],
}


def entry(value, *, low=None, high=None, column="rouge_l_jieba", scale=1.0, **changes):
    made = ScoreEntry(
        column=column,
        name="rougeL",
        tokenizer="jieba",
        library="rouge_score",
        convention="F1",
        scale=scale,
        value=value,
        low=value - 0.02 if low is None else low,
        high=value + 0.02 if high is None else high,
        n=40,
    )
    return dataclasses.replace(made, **changes)


def corpus_bleu_entry(value):
    return entry(
        value, column="bleu_4_zh", name="bleu4", tokenizer="zh", library="sacrebleu", scale=100.0
    )


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


class Page(html.parser.HTMLParser):
    """Collects every tag with its attributes, and refuses tags that do not match."""

    VOID = frozenset({"meta", "img", "input", "br", "hr", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.texts.append(data)


def test_the_summary_of_a_small_experiment_is_this_file(tmp_path):
    lab = Lab(tmp_path, {"method": ["lora", "qlora"], "rows": ["20k"]})
    lab.finish("lora_20k", [entry(0.2871234567, low=0.25, high=0.3)])
    lab.leg("qlora_20k", 1, "handed_over", to_step=40, reason="USR1")
    lab.leg("qlora_20k", 2, "failed", to_step=55, reason="CUDA out of\nmemory, sorry")
    assert lab.csv() == (
        "task,method,rows,state,reason,rouge_l_jieba,rouge_l_jieba_low,rouge_l_jieba_high,"
        "train_start_utc,train_end_utc,train_seconds,legs,steps,best_step,dev_loss,"
        "train_samples,train_tokens,train_tokens_per_s,train_samples_per_s,"
        "train_peak_gpu_memory_gib,trainable_parameters,total_parameters,adapter_mib,"
        "generation_seconds,generation_samples,generation_new_tokens,generation_samples_per_s,"
        "generation_new_tokens_per_s,generation_peak_gpu_memory_gib,decoding,max_new_tokens,"
        "generation_batch_size,n\n"
        "lora_20k,lora,20k,finished,,0.287123,0.25,0.3,"
        "2026-05-01T08:00:00.000+00:00,2026-05-01T09:00:00.000+00:00,1800.5,2,100,80,1.25,"
        "1600,160000,88.25,0.5,1.5,1000,50000,2,10,40,400,4,40,,greedy,16,8,40\n"
        'qlora_20k,qlora,20k,failed,"failed in leg 2, stage train, step 55: CUDA out of memory,'
        ' sorry",,,,,,,,,,,,,,,,,,,,,,,,,,,,\n'
    )


def test_a_notice_is_the_first_column_and_stands_in_the_first_line_of_the_page(tmp_path):
    lab = Lab(tmp_path, METHODS, notice="random weights")
    lab.finish("lora", notice="random weights")
    collected = lab.collect()
    assert lab.text("results_summary.csv").startswith("notice,task,")
    assert [row["notice"] for row in rows_of(lab.csv())] == ["random weights"] * 2
    assert "random weights" in lab.text().splitlines()[0]
    assert collected.notice == "random weights"


def test_a_notice_of_some_tasks_says_which(tmp_path):
    lab = Lab(tmp_path, METHODS)
    lab.finish("lora", notice="random weights")
    lab.finish("qlora")
    assert lab.collect().notice == "random weights (lora)"
    assert [row["notice"] for row in rows_of(lab.csv())] == ["random weights", ""]


def test_every_task_without_a_result_is_listed_with_its_reason(tmp_path):
    lab = Lab(tmp_path, {"t": ["a", "b", "c", "d", "e", "f", "g", "h", "i"]})
    lab.finish("a")
    lab.leg("c", 1, "handed_over", reason="USR1")
    lab.leg("c", 2, "active", from_step=10)
    lab.put("c", "train/metrics.jsonl", b'{"step": 30, "loss": 2.5}\n{"step": 40, "lo')
    lab.leg("d", 9, "lost", reason="older")
    lab.leg("d", 10, "failed", reason="no space left")
    lab.put("e", "eval/eval.json", b'{"schema": 1, "exper')
    lab.finish("f", digest="00000000")
    lab.put("g", "legs/001.json", b"{}")
    lab.leg("h", 1, "handed_over", to_step=7, reason="TERM")
    lab.put("i", "eval/eval.json", b'{"schema": 99}')
    missing = {result.name: result.reason for result in lab.gather() if not result.record}
    assert missing == {
        "b": "not started: no leg has worked on it",
        "c": "running leg 2, stage train, step 30",
        "d": "failed in leg 10, stage train: no space left",
        "e": "tasks/e/eval/eval.json: not JSON (Unterminated string starting at: line 1 column 15"
        " (char 14)); it was damaged or cut off",
        "f": "tasks/f/eval/eval.json: belongs to digest '00000000', not '3f9c1a2b';"
        " run the task again",
        "g": missing["g"],
        "h": "waiting for the leg after 1, stage train, step 7: TERM",
        "i": "tasks/i/eval/eval.json: written by a newer baton (schema 99, this one knows 1);"
        " upgrade baton to read it",
    }
    assert "missing key" in missing["g"]
    states = [row["state"] for row in rows_of(lab.csv())]
    expected = "finished,not started,running,failed,damaged,damaged,unknown,handed over,unreadable"
    assert states == expected.split(",")
    page = "".join(Page(lab.page()).texts)
    assert all(reason in page for reason in missing.values())


def test_a_state_that_the_launcher_knows_is_used(tmp_path):
    lab = Lab(tmp_path, METHODS)
    states = [row["state"] for row in rows_of(lab.csv(lora="queued"))]
    assert states == ["queued", "not started"]


def test_unknown_figures_are_empty_cells_and_never_zeros(tmp_path):
    lab = Lab(tmp_path, METHODS)
    record = lab.record("lora")
    training = dataclasses.replace(record.training, peak_gpu_memory_bytes=None, dev_loss=None)
    lab.finish("lora", training=training)
    found, missing = rows_of(lab.csv())
    assert found["train_peak_gpu_memory_gib"] == found["dev_loss"] == ""
    assert {text for name, text in missing.items() if name not in ("task", "method")} == {
        "",
        "not started",
        "not started: no leg has worked on it",
    }


def test_an_axis_named_like_a_column_does_not_hide_it(tmp_path):
    lab = Lab(tmp_path, {"steps": ["10", "20"], "state": ["x"]})
    lab.finish_all()
    row = rows_of(lab.csv())[0]
    assert (row["axis_steps"], row["steps"]) == ("10", "100")
    assert (row["axis_state"], row["state"]) == ("x", "finished")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A finished experiment of four tasks, collected."""
    lab = Lab(tmp_path_factory.mktemp("full"), MATRIX)
    lab.finish_all(**CURVES)
    lab.collected = lab.collect()
    return lab


def test_the_same_input_gives_the_same_bytes(full):
    names = ["results_summary.csv", "report.html"]
    first = [(full.out / name).read_bytes() for name in names]
    full.collect()
    assert [(full.out / name).read_bytes() for name in names] == first


def test_plots_are_pictures_with_something_in_them(full):
    assert {path.name for path in full.collected.files} == {
        *PLOTS,
        "results_summary.csv",
        "report.html",
    }
    for name in PLOTS:
        picture = np.asarray(Image.open(full.out / name).convert("L"))
        assert picture.shape[1] == 1800
        assert picture.shape[0] > 700
        assert picture.std() > 10
        # Nothing touches the edge, so nothing is cut off.
        for edge in (picture[0], picture[-1], picture[:, 0], picture[:, -1]):
            assert edge.min() == 255


def test_without_an_axis_of_numbers_the_page_says_so_and_no_old_plot_stays(tmp_path):
    lab = Lab(tmp_path, METHODS)
    lab.finish_all(**CURVES)
    lab.out.mkdir()
    (lab.out / PLOTS[0]).write_bytes(b"old")
    collected = lab.collect()
    reason = "the matrix has no axis of numbers (method: lora, qlora)"
    assert collected.not_drawn == {PLOTS[0]: reason}
    assert not (lab.out / PLOTS[0]).exists()
    assert reason in lab.text()


def test_an_experiment_without_any_result_has_a_summary_and_a_page(tmp_path):
    lab = Lab(tmp_path, MATRIX)
    collected = lab.collect()
    assert {path.name for path in collected.files} == {"results_summary.csv", "report.html"}
    assert len(collected.missing) == len(collected.rows) == 4
    assert "0 of 4 tasks have a result" in lab.text()
    Page(lab.text())


def test_one_task_without_labels_is_drawn(tmp_path):
    lab = Lab(tmp_path, {})
    lab.finish("only", **CURVES)
    assert set(lab.collect().not_drawn) == {PLOTS[0]}


def test_one_size_of_several_is_drawn_without_a_warning(tmp_path):
    lab = Lab(tmp_path, {"rows": ["1m", "5m", "10m"]})
    lab.finish(lab.plan.tasks[2].name, **CURVES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(lab.collect().missing) == 2


@pytest.mark.parametrize(
    ("limits", "labels"),
    [((0.6, 9.0), {"1", "2", "5"}), ((0.01, 9.0), {"0.01", "0.1", "1"})],
)
def test_a_logarithmic_axis_has_plain_numbers(limits, labels):
    from matplotlib.figure import Figure

    with style():
        axes = Figure().subplots()
        axes.set_ylim(*limits)
        plain_powers(axes)
        ticks = axes.get_yticklabels() + axes.get_yticklabels(minor=True)
        low, high = limits
        texts = {tick.get_text() for tick in ticks if low <= tick.get_position()[1] <= high}
    assert texts - {""} == labels


def test_names_that_the_font_of_the_plots_lacks_are_numbered_and_explained(tmp_path):
    axes = {"方法": ["低秩", "_full", "$a$"], "rows": ["1k", "2k"]}
    lab = Lab(tmp_path, axes, experiment="医学", notice="随机")
    for task in lab.plan.tasks:
        lab.finish(task.name, [entry(0.25, name="得分", tokenizer="结巴")], **CURVES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of every glyph that it lacks
        lab.collect()
    assert "#2 is 低秩" in lab.text()


def test_a_large_experiment_says_what_is_left_out(tmp_path):
    lab = Lab(tmp_path, {"m": [f"m{i}" for i in range(13)], "rows": ["1k", "2k", "5k"]})
    lab.finish_all(**CURVES)
    assert len(rows_of(lab.csv())) == 39
    assert sum(result.curves_read for result in lab.gather()) == 36
    page = lab.page()
    # 3 sizes of 78 pairs of methods each, and 2 steps of size for each of 13 methods.
    assert "236 more pairs are left out." in page
    assert "27 more have samples in their eval records" in page


def test_text_from_models_and_data_is_escaped_everywhere(tmp_path):
    lab = Lab(
        tmp_path,
        {"m<b>'\"": ["<i>x", "b"]},
        experiment=NASTY,
        notice=NASTY,
        config={NASTY: NASTY},
    )
    first, second = (task.name for task in lab.plan.tasks)
    lab.finish(
        first,
        [entry(0.1, name=NASTY, tokenizer=NASTY, convention=NASTY)],
        samples=[Sample(prompt=NASTY, reference=NASTY, prediction=NASTY)],
        environment={NASTY: NASTY},
        notice=NASTY,
    )
    lab.leg(first, 1, "handed_over", reason=NASTY, signal=NASTY)
    lab.leg(second, 1, "failed", reason=NASTY)
    lab.collect()
    page = Page(lab.text())
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not {"b", "i"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "".join(page.texts).count(NASTY) >= 10


def test_the_page_needs_nothing_but_itself(full):
    text = full.text()
    page = Page(text)
    assert "link" not in {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert "http:" not in (value or ""), (tag, name)
            assert "https:" not in (value or ""), (tag, name)
        if "src" in attrs:
            assert tag == "img"
            assert attrs["src"].startswith("data:image/png;base64,")
            assert attrs["alt"]
    assert "url(" not in text
    assert "@import" not in text


def test_every_score_stands_beside_its_tokenizer_and_convention(tmp_path):
    lab = Lab(tmp_path, METHODS)
    lab.finish_all()
    page = lab.page()
    assert '<th scope="row">rougeL<small>jieba, rouge_score</small></th>' in page
    assert "<td>F1</td>" in page


def test_the_best_is_marked_and_what_its_interval_meets_is_marked_lightly():
    entries = [
        entry(0.30, low=0.28, high=0.32),
        entry(0.29, low=0.27, high=0.31),
        None,
        entry(0.20, low=0.18, high=0.22),
    ]
    assert marks(entries) == ["best", "near", "", ""]


def test_a_score_above_its_best_possible_value_is_better_when_lower():
    entries = [entry(9.0, low=8.5, high=9.5), entry(5.0, low=4.5, high=5.5)]
    assert marks(entries) == ["", "best"]


def test_one_value_or_two_conventions_are_not_marked():
    assert marks([entry(0.3), None]) == ["", ""]
    assert marks([entry(0.3), entry(0.2, tokenizer="char")]) == ["", ""]


def put_rows(lab, task, scores, statistics=(), rows=None):
    record = PerSample(
        rows=list(range(len(scores))) if rows is None else rows,
        scores={"rouge_l_jieba": list(map(float, scores))},
        bleu_statistics=[list(map(int, row)) for row in statistics],
    )
    lab.put(task, "eval/per_sample.json", record.to_json())


def test_a_paired_comparison_is_that_of_the_scorer(tmp_path):
    lab = Lab(tmp_path, METHODS)
    rng = np.random.default_rng(3)
    lora = rng.random(300)
    qlora = lora - 0.01 + rng.normal(0, 0.02, 300)
    words = rng.integers(20, 40, size=(300, 1))
    statistics = [
        np.concatenate(
            [words, words + 1, words * part // 10, words, *[words - k for k in (1, 2, 3)]], 1
        )
        for part in (np.array([[8, 6, 5, 4]]), np.array([[7, 5, 4, 3]]))
    ]
    for task, scores, rows in (("lora", lora, statistics[0]), ("qlora", qlora, statistics[1])):
        put_rows(lab, task, scores, rows)
        lab.finish(task, [entry(scores.mean()), corpus_bleu_entry(20.0)])
    mean, corpus = lab.compare().differences
    expected = paired_difference(lora, qlora, seed=0)
    assert dataclasses.astuple(mean.interval) == pytest.approx(dataclasses.astuple(expected))
    bleu = paired_corpus_bleu_difference(*statistics, seed=0)
    assert dataclasses.astuple(corpus.interval) == pytest.approx(dataclasses.astuple(bleu))
    assert [mean.verdict, corpus.verdict] == ["lora is better"] * 2
    assert [mean.rows, corpus.rows] == [300, 300]
    cells = f"<td>{expected.mean:+.4f}</td><td>{expected.low:+.4f} to {expected.high:+.4f}</td>"
    assert cells in lab.page()


def test_an_interval_that_includes_zero_claims_nothing(tmp_path):
    lab = Lab(tmp_path, METHODS)
    noise = np.random.default_rng(0).normal(0, 0.1, 100)
    put_rows(lab, "lora", np.full(100, 0.5))
    put_rows(lab, "qlora", 0.5 + noise - noise.mean())
    lab.finish_all()
    assert [each.verdict for each in lab.compare().differences] == [NO_DIFFERENCE]
    assert NO_DIFFERENCE in lab.page()


def test_one_test_row_claims_nothing(tmp_path):
    lab = Lab(tmp_path, METHODS)
    put_rows(lab, "lora", [0.9])
    put_rows(lab, "qlora", [0.1])
    lab.finish_all()
    assert [each.verdict for each in lab.compare().differences] == [NO_DIFFERENCE]


def test_more_data_is_compared_with_the_next_less_and_lower_can_be_better(tmp_path):
    lab = Lab(tmp_path, {"rows": ["50k", "20k", "100k"]})
    for task, value in (("20k", 7.0), ("50k", 9.0), ("100k", 5.0)):
        put_rows(lab, task, value + np.arange(20) / 100)
        lab.finish(task, [entry(value)])
    differences = lab.compare().differences
    assert [each.pair.title for each in differences] == ["50k − 20k", "100k − 50k"]
    assert [each.interval.mean for each in differences] == pytest.approx([2.0, -4.0])
    assert [each.verdict for each in differences] == ["20k is better", "100k is better"]


def test_tasks_are_compared_on_the_test_rows_that_both_have(tmp_path):
    lab = Lab(tmp_path, METHODS)
    put_rows(lab, "lora", [0.1, 0.2, 0.3, 0.4], rows=[7, 5, 3, 1])
    put_rows(lab, "qlora", [0.35, 0.25, 0.0], rows=[3, 5, 100])
    lab.finish_all()
    (difference,) = lab.compare().differences
    # Rows 3 and 5: 0.3 - 0.35 and 0.2 - 0.25.
    assert difference.interval.mean == pytest.approx(-0.05)
    assert difference.rows == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda lab: lab.store.delete("tasks/qlora/eval/per_sample.json"), "nothing is stored"),
        (lambda lab: lab.put("qlora", "eval/per_sample.json", b'{"schema":'), "not JSON"),
        (lambda lab: put_rows(lab, "qlora", [0.1, 0.2], rows=[1]), "2 values for 1 rows"),
        (lambda lab: put_rows(lab, "qlora", [0.1, 0.2], rows=[8, 9]), "different rows"),
        (
            lambda lab: lab.finish(
                "qlora", samples=[Sample(prompt="Why?", reference="Other.", prediction="")]
            ),
            "different questions",
        ),
        (lambda lab: lab.finish("qlora", [entry(0.2, tokenizer="char")]), "no score of the same"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_listed_with_the_reason(tmp_path, spoil, reason):
    lab = Lab(tmp_path, METHODS)
    for task in ("lora", "qlora"):
        put_rows(lab, task, [0.1, 0.2])
        lab.finish(task)
    spoil(lab)
    ((pair, found),) = lab.compare().refused
    assert (pair.a.name, pair.b.name) == ("lora", "qlora")
    assert reason in found
    assert found in html.unescape(lab.page())


def test_the_json_has_numbers_and_null(tmp_path):
    lab = Lab(tmp_path, METHODS)
    lab.finish("lora", [entry(0.123456789)], **CURVES)
    collected = json.loads(lab.collect().to_json())
    assert [row["rouge_l_jieba"] for row in collected["rows"]] == [0.123456789, None]
    assert collected["missing"] == {"qlora": "not started: no leg has worked on it"}
    assert [name.rsplit("/", 1)[1] for name in collected["files"]] == [
        "results_summary.csv",
        "method_comparison.png",
        "loss_curves.png",
        "report.html",
    ]


def test_results_that_cannot_be_written_are_a_store_error_that_says_what_to_do(tmp_path):
    lab = Lab(tmp_path, METHODS)
    lab.out.write_text("a file")
    with pytest.raises(StoreError, match="choose another folder with --out"):
        lab.collect()


def test_nothing_unfinished_is_left_beside_the_results(tmp_path):
    lab = Lab(tmp_path, METHODS)
    written = lab.collect().files
    assert sorted(lab.out.iterdir()) == sorted(written)


def test_the_fast_way_to_read_a_record_finds_what_the_decoder_finds(tmp_path):
    record = Lab(tmp_path, METHODS).record("lora", notice="random weights", **CURVES)
    read = read_eval_record(record.to_json(), where="x")
    assert read.record == dataclasses.replace(record, loss_curve=[], dev_curve=[])
    assert read.train_curve.tolist() == record.loss_curve
    assert read.dev_curve.tolist() == record.dev_curve


def test_scores_taken_with_the_dev_loss_are_read_and_drawn_beside_it(tmp_path):
    scores = {"dev_bleu": [[40.0, 3.5], [80.0, 7.25]]}
    pictures = []
    for name, changes in (("without", {}), ("with", {"dev_scores": scores})):
        (tmp_path / name).mkdir()
        lab = Lab(tmp_path / name, METHODS)
        record = lab.record("lora", **CURVES, **changes)
        assert read_eval_record(record.to_json(), where="x").record.dev_scores == record.dev_scores
        lab.finish("lora", [entry(0.5)], **CURVES, **changes)
        lab.collect()
        pictures.append((lab.out / "loss_curves.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_curves_are_left_out_without_reading_them_and_nothing_else_changes(tmp_path):
    nasty = 'a\n  "loss_curve": [1],\n  "samples": [2]'
    record = Lab(tmp_path, METHODS).record(
        "lora",
        samples=[Sample(prompt=nasty, reference="", prediction=nasty)],
        environment={"loss_curve": nasty},
        **CURVES,
    )
    read = read_eval_record(record.to_json(), where="x", curves=False)
    assert read.record == dataclasses.replace(record, loss_curve=[], dev_curve=[])
    assert len(read.train_curve) == len(read.dev_curve) == 0
    # A record that something else wrote may stand on one line.
    one_line = json.dumps(json.loads(record.to_json())).encode()
    assert read_eval_record(one_line, where="x", curves=False).record == read.record


def test_whole_numbers_where_a_float_belongs_are_read(tmp_path):
    values = json.loads(Lab(tmp_path, METHODS).record("lora").to_json())
    values["scores"][0]["value"] = 1
    values["loss_curve"] = [[1, 2]]
    read = read_eval_record(json.dumps(values).encode(), where="x")
    assert type(read.record.scores[0].value) is float
    assert read.train_curve.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: values["scores"][0].update(value="0.5"), "x: scores[0].value: "),
        (lambda values: values["scores"][0].pop("n"), "x: scores[0].n: missing key"),
        (lambda values: values["scores"][0].update(value=float("nan")), "x: scores[0].value: "),
        (lambda values: values["training"].update(seconds=float("inf")), "x: training.seconds: "),
        (lambda values: values.update(extra=1), "x: extra: unknown key"),
        (lambda values: values["labels"].update(rows=20), "x: labels.rows: "),
        (lambda values: values.update(loss_curve=[[1.0, "2"]]), "x: loss_curve[0][1]: "),
        (lambda values: values.update(loss_curve=[[1.0]]), "x: loss_curve: every point must be"),
        (lambda values: values.update(schema=99), "x: written by a newer baton"),
        (lambda values: values.clear(), "x: experiment: missing key"),
    ],
)
def test_a_damaged_record_is_refused_in_the_words_of_the_decoder(tmp_path, spoil, message):
    values = json.loads(Lab(tmp_path, METHODS).record("lora").to_json())
    spoil(values)
    with pytest.raises(BatonError) as refused:
        read_eval_record(json.dumps(values).encode(), where="x")
    assert message in str(refused.value)


def test_a_long_curve_is_averaged_and_keeps_its_ends(tmp_path):
    curve = [[float(step), 3.0] for step in range(1, 5001)]
    record = Lab(tmp_path, METHODS).record("lora", loss_curve=curve)
    thin = read_eval_record(record.to_json(), where="x").train_curve
    assert len(thin) == 300
    assert (thin[:, 1] == 3.0).all()
    assert thin[0, 0] < 20
    assert thin[-1, 0] > 4980
