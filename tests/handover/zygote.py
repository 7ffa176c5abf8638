"""Legs without their six seconds of imports: a process imports everything once and forks.

A leg is the public command (`baton.cli.main`) in a process of its own, so a SIGKILL really
kills it. The server is single-threaded and reaps every child; OpenMP has one thread and no
parallel region has run before a fork, which is what makes forking after `import torch` safe.

    with Zygote() as zygote:
        leg = zygote.start(["run", "plan.json", "--task", "lora"], log=path)
        leg.kill(signal.SIGTERM)
        assert leg.wait() == 75
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What the pipelines import while they run; without them every leg would pay again.
PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.utils.tensorboard",
    "transformers",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.generation.utils",
    "transformers.integrations.bitsandbytes",
    "transformers.quantizers.quantizer_bnb_4bit",
    "peft",
    "bitsandbytes",
    "tokenizers",
    "pyarrow.parquet",
    "rouge_score.rouge_scorer",
    "sacrebleu",
    "boto3",
    "huggingface_hub",
    "baton.cli",
    "baton.store.s3",
    "baton.store.hub",
    "baton.store.hub_objects",
    "baton.runner",
    "baton.plan",
    "baton.pipelines.medical_qa.stages",
)
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "BATON_DEVICE": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
START_SECONDS = 300.0
# A leg of a smoke task takes a second or two; one that takes this long hangs.
LEG_SECONDS = 120.0


class Hung(AssertionError):
    """A leg did not end in time; it was killed."""


class Leg:
    """A forked process that runs one command, and the connection to the one who reaps it."""

    def __init__(self, connection: socket.socket, log: Path) -> None:
        self._connection = connection
        self._received = b""
        self.log = log
        self.pid = int(self._read()["pid"])
        self.status: int | None = None

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal; False if the leg had ended (its number may be another's by now)."""
        if self.status is not None:
            return False
        self._connection.sendall(json.dumps({"kill": int(number)}).encode() + b"\n")
        answer = self._read()
        if "status" in answer:
            # It ended first; the answer to the signal follows.
            self._ended(answer)
            answer = self._read()
        return bool(answer["sent"])

    def poll(self) -> int | None:
        """The exit status if the leg has ended; negative is the signal that ended it."""
        if self.status is None and self._has_answer(0):
            self._ended(self._read())
        return self.status

    def wait(self, timeout: float = LEG_SECONDS) -> int:
        """Wait for the end. Raises `Hung` with the tail of the log."""
        if self.status is None:
            if not self._has_answer(timeout):
                self.kill(signal.SIGKILL)
                raise Hung(f"leg {self.pid} still ran after {timeout:.0f} s:\n{self.text[-2000:]}")
            self._ended(self._read())
        assert self.status is not None
        return self.status

    @property
    def text(self) -> str:
        """Everything printed to this leg's log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def _ended(self, answer: dict[str, Any]) -> None:
        self.status = int(answer["status"])

    def _has_answer(self, timeout: float) -> bool:
        """Is there one? It may have come together with the one before."""
        return bool(self._received or select.select([self._connection], [], [], timeout)[0])

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            data = self._connection.recv(65536)
            if not data:
                raise ConnectionError("the zygote is gone")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Zygote:
    """Starts legs. `source` is the folder that holds the package `baton`, if not the installed."""

    def __init__(
        self, source: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="zygote-"))
        self._address = str(self._folder / "socket")
        env = os.environ | ONE_THREAD | dict(environment or {})
        if source is not None:
            env["PYTHONPATH"] = str(source)
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._address],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Ctrl-C is for whoever uses the legs, not for the legs.
            start_new_session=True,
        )
        self._is_ready = False

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self,
        argv: Sequence[object],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        hook: tuple[Path, str, Mapping[str, Any]] | None = None,
    ) -> Leg:
        """Fork a leg that runs `baton ARGV…`, its output appended to `log`.

        `hook` is a file, a function in it and its arguments: called in the leg before the
        command, to inject faults.
        """
        self._wait_until_ready()
        log.parent.mkdir(parents=True, exist_ok=True)
        request = {
            "argv": [str(word) for word in argv],
            "log": str(log),
            "env": dict(env or {}),
            "cwd": str(cwd or Path.cwd()),
            "hook": [str(hook[0]), hook[1], dict(hook[2])] if hook else None,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        connection.sendall(json.dumps(request).encode() + b"\n")
        return Leg(connection, log)

    def close(self) -> None:
        """Kill what still runs and end the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        if self._is_ready:
            return
        assert self._process.stdout is not None
        found, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        if not found or not self._process.stdout.readline():
            raise RuntimeError("the zygote did not start; its traceback stands above")
        self._is_ready = True


# --- the server -----------------------------------------------------------------------------


class _Child:
    """A leg as the server sees it: its process, and whom to tell."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.received = b""
        self.pid = 0
        self.pidfd = -1

    @property
    def is_alive(self) -> bool:
        return self.pidfd >= 0

    def tell(self, **values: object) -> None:
        # The one who asked may be gone.
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(values).encode() + b"\n")

    def signal(self, number: int) -> bool:
        if not self.is_alive:
            return False
        signal.pidfd_send_signal(self.pidfd, number)
        return True

    def reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.pidfd = -1
        self.tell(status=os.waitstatus_to_exitcode(status))


def serve(address: str) -> None:
    """Fork a leg for each connection until standard input closes."""
    started = time.monotonic()
    for name in PRELOADED:
        importlib.import_module(name)
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from baton.eval.rouge import jieba_tokens

    torch.set_num_threads(1)
    # Two tables that are built at first use and take longer than a smoke task's training.
    jieba_tokens("预热")
    get_checkpoint_conversion_mapping("qwen2")
    # What was imported stays for ever: no collection in a leg should walk or copy it.
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    print(f"ready {time.monotonic() - started:.1f} s, {threads} threads", flush=True)
    children: list[_Child] = []
    while True:
        waited: dict[Any, _Child | None] = {sys.stdin.fileno(): None, listener: None}
        for child in children:
            waited[child.connection] = child
            if child.is_alive:
                waited[child.pidfd] = child
        ready, _, _ = select.select(list(waited), [], [])
        for source in ready:
            child = waited[source]
            if source is listener:
                children.append(_Child(listener.accept()[0]))
            elif child is None:
                for each in children:
                    if each.signal(signal.SIGKILL):
                        each.reap()
                return
            elif source is child.connection:
                _listen(child, children, listener)
            elif child.is_alive:
                child.reap()


def _listen(child: _Child, children: list[_Child], listener: socket.socket) -> None:
    try:
        data = child.connection.recv(65536)
    except OSError:
        data = b""
    if not data:
        # Nobody waits for this leg any more.
        if child.signal(signal.SIGKILL):
            child.reap()
        child.connection.close()
        children.remove(child)
        return
    child.received += data
    while b"\n" in child.received:
        line, _, child.received = child.received.partition(b"\n")
        request = json.loads(line)
        if "kill" in request:
            child.tell(sent=child.signal(request["kill"]))
            continue
        child.pid = os.fork()
        if child.pid == 0:
            for each in children:
                each.connection.close()
                if each.is_alive:
                    os.close(each.pidfd)
            listener.close()
            _become_leg(request)
        child.pidfd = os.pidfd_open(child.pid)
        child.tell(pid=child.pid)


def _become_leg(request: Mapping[str, Any]) -> None:
    """In the child: run the command and never return."""
    status = 70
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for target, descriptor in ((0, null), (1, log), (2, log)):
            os.dup2(descriptor, target)
        sys.argv = ["baton", *request["argv"]]
        if request["hook"]:
            path, name, arguments = request["hook"]
            getattr(_load(path), name)(**arguments)
        cli = importlib.import_module("baton.cli")
        cli.main()
        status = 0
    except SystemExit as error:
        # What the interpreter does with `sys.exit(x)`.
        code = error.code
        status = 0 if code is None else code if isinstance(code, int) else 1
    # Anything else ends a real process with a traceback and status 1.
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        status = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(status))


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve(sys.argv[1])
