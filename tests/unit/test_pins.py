"""Commits behind Hub revisions: looked up once, kept in plan.json, used by every later leg."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

JOB = """\
pipeline: medical_qa
model: {source: huggingface, name: some/model}
data: {hub: some/data}
"""
FIRST, SECOND = "a" * 40, "b" * 40


@dataclass
class Hub:
    """Answers what `HfApi.repo_info` asks, and remembers who asked for what."""

    url: str = ""
    main: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub on this machine with one model and one data set."""
    hub = Hub(main={"models/some/model": FIRST, "datasets/some/data": "d" * 40})

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # The client asks the Hub for things of its own, too.
            if "/revision/" in self.path:
                hub.asked.append(self.path)
                hub.tokens.append(self.headers.get("Authorization"))
            name, _, revision = self.path.removeprefix("/api/").partition("/revision/")
            sha = hub.main.get(name) if revision == "main" else None
            if name in hub.main and revision in (FIRST, SECOND):
                sha = revision
            if sha:
                self.answer(200, {"id": name.partition("/")[2], "sha": sha, "siblings": []}, "")
            elif name in hub.main:
                self.answer(404, {"error": "Invalid rev id"}, "RevisionNotFound")
            elif "gated" in name:
                self.answer(403, {"error": "ask"}, "GatedRepo")
            elif "broken" in name:
                self.answer(500, {"error": "oops"}, "")
            else:
                self.answer(404, {"error": "Repository not found"}, "RepoNotFound")

        def answer(self, status: int, body: dict[str, object], code: str) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A project with one experiment on Hub names."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "local.yaml").write_text("launcher: local\n")
    (tmp_path / "jobs" / "qa.yaml").write_text(JOB)
    return tmp_path


def freeze(home: Path, endpoint: str, *settings: str) -> subprocess.CompletedProcess[str]:
    """Freeze the plan, as a submission does first, in a process that reads HF_ENDPOINT itself."""
    program = """
import sys
from pathlib import Path
from baton.cli.target import plan_of
from baton.frozen import freeze
try:
    plan, _ = plan_of("qa", sys.argv[2:])
    print(freeze(plan, Path(sys.argv[1])))
except Exception as error:
    sys.stderr.write(str(error))
    sys.exit(error.exit_status)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"BATON_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf")}
    return subprocess.run(
        [sys.executable, "-c", program, str(home / "runs"), *settings],
        capture_output=True,
        text=True,
        env=environment | {"HF_TOKEN": "hf_canary"},
        cwd=home,
        check=False,
    )


def pins(frozen: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert frozen.returncode == 0, frozen.stderr
    values: dict[str, dict[str, str]] = json.loads(Path(frozen.stdout.strip()).read_bytes())
    return values["pins"]


def closed_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_revisions_are_looked_up_at_the_endpoint_and_written_into_the_plan(
    home: Path, hub: Hub
) -> None:
    assert pins(freeze(home, hub.url)) == {
        "model:some/model@main": FIRST,
        "dataset:some/data@main": "d" * 40,
    }
    assert sorted(hub.asked) == [
        "/api/datasets/some/data/revision/main",
        "/api/models/some/model/revision/main",
    ]


def test_submitting_again_uses_the_pins_although_main_moved_on(home: Path, hub: Hub) -> None:
    before = pins(freeze(home, hub.url))
    hub.main["models/some/model"] = SECOND
    asked = len(hub.asked)
    assert pins(freeze(home, hub.url)) == before
    assert len(hub.asked) == asked, "nothing is looked up twice"


def test_submitting_again_needs_no_network(home: Path, hub: Hub) -> None:
    before = pins(freeze(home, hub.url))
    assert pins(freeze(home, closed_port())) == before


def test_another_revision_is_another_plan_with_its_own_pin(home: Path, hub: Hub) -> None:
    first = freeze(home, hub.url)
    second = freeze(home, hub.url, f"model.revision={SECOND}")
    assert pins(second)[f"model:some/model@{SECOND}"] == SECOND
    assert first.stdout != second.stdout


def test_a_token_goes_to_the_hub_and_into_no_plan(home: Path, hub: Hub) -> None:
    path = Path(freeze(home, hub.url).stdout.strip())
    assert set(hub.tokens) == {"Bearer hf_canary"}
    assert "hf_canary" not in path.read_text()


def test_an_unreachable_hub_is_answered_with_three_ways_out(home: Path) -> None:
    endpoint = closed_port()
    frozen = freeze(home, endpoint, "data.hub=", "data.path=launch/local.yaml")
    assert frozen.returncode == 78
    assert frozen.stderr == (
        f"some/model could not be fetched from {endpoint} (ConnectError) and is not in the cache."
        " Three ways out: set HF_ENDPOINT to a mirror you can reach; use `source: modelscope`; or"
        " download it elsewhere and use `source: path`"
    )
    assert not (home / "runs").exists(), "nothing is left of a submission that did not start"


def test_an_unreachable_data_set_has_its_own_three_ways_out(home: Path) -> None:
    frozen = freeze(home, closed_port(), "model={source: path, path: .}")
    assert frozen.returncode == 78
    assert frozen.stderr.endswith(
        "Three ways out: set HF_ENDPOINT to a mirror you can reach; name another data set; or"
        " download it elsewhere and use `data.path`"
    )


def test_a_model_in_the_cache_needs_no_hub(home: Path) -> None:
    repo = home / "hf" / "hub" / "models--some--model"
    (repo / "snapshots" / FIRST).mkdir(parents=True)
    (repo / "snapshots" / FIRST / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(FIRST)
    frozen = freeze(home, closed_port(), "data.hub=", "data.path=launch/local.yaml")
    assert pins(frozen) == {"model:some/model@main": FIRST}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "model.name=no/such",
            "the Hub has no model 'no/such' at revision 'main' (or it is private and HF_TOKEN is"
            " missing)",
        ),
        (
            "model.revision=v9",
            "the Hub has no model 'some/model' at revision 'v9' (or it is private and HF_TOKEN is"
            " missing)",
        ),
        (
            "model.name=a/gated",
            "a/gated is gated: accept its terms on the Hub and set HF_TOKEN",
        ),
        (
            "data.hub=no/such",
            "the Hub has no dataset 'no/such' at revision 'main' (or it is private and HF_TOKEN is"
            " missing)",
        ),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    home: Path, hub: Hub, setting: str, expected: str
) -> None:
    frozen = freeze(home, hub.url, setting)
    assert (frozen.returncode, frozen.stderr) == (78, expected)


def test_a_hub_that_answers_with_an_error_is_named_with_it(home: Path, hub: Hub) -> None:
    frozen = freeze(home, hub.url, "model.name=a/broken")
    assert frozen.returncode == 78
    assert f"a/broken could not be fetched from {hub.url} (" in frozen.stderr


@pytest.mark.parametrize("name", ["a b", "a/b/c", "../x", "x" * 200])
def test_a_name_that_no_hub_can_have_is_no_traceback(home: Path, hub: Hub, name: str) -> None:
    frozen = freeze(home, hub.url, f"model.name={name}")
    assert frozen.returncode == 78
    assert name in frozen.stderr
    assert "Traceback" not in frozen.stderr


def test_modelscope_and_folders_are_not_pinned(home: Path, hub: Hub) -> None:
    settings = ["data.hub=", "data.path=launch/local.yaml"]
    modelscope = freeze(home, hub.url, "model.source=modelscope", *settings)
    folder = freeze(home, hub.url, "model={source: path, path: .}", *settings)
    assert pins(modelscope) == pins(folder) == {}
    assert hub.asked == []
