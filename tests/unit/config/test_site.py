"""Site files: where to run."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.config.experiment import available
from baton.config.site import LocalSite, load_site
from baton.errors import ConfigError

LAUNCH = Path(__file__).parents[3] / "launch"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder; its sites are in `launch/`."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "launch").mkdir()
    monkeypatch.setenv("BATON_HOME", str(tmp_path))
    return tmp_path


def site(home: Path, text: str) -> LocalSite:
    (home / "launch" / "here.yaml").write_text(text, encoding="utf-8")
    return load_site("here")


def problems(home: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        site(home, text)
    return [line.replace(f"{home}/launch/", "") for line in caught.value.problems]


@pytest.mark.parametrize("name", available(LAUNCH))
def test_every_site_of_the_project_loads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_HOME", str(LAUNCH.parent))
    assert load_site(name).launcher


def test_the_local_site_of_the_project_says_what_the_defaults_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BATON_HOME", str(LAUNCH.parent))
    assert load_site("local") == LocalSite(launcher="local")


def test_a_site_may_leave_out_all_but_its_launcher(home: Path) -> None:
    assert site(home, "launcher: local\n") == LocalSite(launcher="local")


def test_an_unknown_site_is_answered_with_the_nearest(home: Path) -> None:
    (home / "launch" / "slurm-a100.yaml").write_text("launcher: local\n")
    with pytest.raises(ConfigError) as caught:
        load_site("slurm-a10")
    expected = f"no site 'slurm-a10' in {home / 'launch'}; did you mean slurm-a100?"
    assert str(caught.value) == expected


def test_all_problems_of_a_site_come_at_once(home: Path) -> None:
    text = "launcher: local\nmax_paralel: 2\nthreads: 0\nretries: -1\nprocesses: two\n"
    assert problems(home, text) == [
        "here.yaml:2: max_paralel: unknown key; did you mean 'max_parallel'?",
        "here.yaml:3: threads: must be at least 1, got 0",
        "here.yaml:4: retries: must be at least 0, got -1",
        "here.yaml:5: processes: expected a whole number, got the text 'two'",
    ]


def test_max_parallel_is_a_number_or_auto(home: Path) -> None:
    assert site(home, "launcher: local\nmax_parallel: 3\n").max_parallel == 3
    [line] = problems(home, "launcher: local\nmax_parallel: all\n")
    assert line.startswith("here.yaml:2: max_parallel: expected a whole number")


def test_an_environment_value_that_is_no_text_must_be_quoted(home: Path) -> None:
    assert problems(home, "launcher: local\nenv: {OMP_NUM_THREADS: 4}\n") == [
        "here.yaml:2: env.OMP_NUM_THREADS: expected text, got the number 4; put it in quotes"
    ]


def test_an_empty_site_file_says_so(home: Path) -> None:
    assert problems(home, "") == [
        "here.yaml: the file is empty; expected 'key: value' lines",
    ]
