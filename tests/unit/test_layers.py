"""Starting `baton` is quick, because nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "pyarrow", "matplotlib", "rich")


def imported_after(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in found.stdout.split()}


def test_the_command_line_imports_nothing_heavy() -> None:
    assert not imported_after("import baton.cli").intersection(HEAVY)


def test_planning_launching_and_looking_need_no_torch() -> None:
    statement = "import baton.plan, baton.runner, baton.launchers.local, baton.status, baton.verify"
    assert not imported_after(statement).intersection(HEAVY)


def test_every_pipelines_configuration_needs_no_torch() -> None:
    statement = "from baton.pipelines import PIPELINES\n[make() for make in PIPELINES.values()]"
    assert not imported_after(statement).intersection(HEAVY)


def test_help_answers_in_three_tenths_of_a_second() -> None:
    seconds = []
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-m", "baton", "--help"], stdout=subprocess.DEVNULL
        )
        # Processor time, and the best of five: what else this machine does only adds to it.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(used.ru_utime + used.ru_stime)
    assert min(seconds) < 0.3, seconds
