"""What can go wrong, and the exit status each kind ends in.

    BatonError                   1   failed; a new leg may succeed
    ├── StopError               78   stop: running the same command again cannot help
    │   ├── ConfigError              a file, a name or a flag is wrong (every problem at once)
    │   ├── DataError                the input data cannot be used as the experiment asks
    │   ├── ModelError               a model or tokenizer cannot be found, loaded or used
    │   ├── FencedError              another leg owns this task
    │   ├── StoreRefused             a store does not know us, or has no such place
    │   ├── CollapsedError           a model got so much worse that training on would be in vain
    │   ├── NewerSchemaError         a record was written by a newer baton
    │   └── NoProgressError          three legs in a row left nothing durable behind
    ├── StoreError                   reading or writing a store failed
    │   ├── StoreBusy                it is overloaded or out of reach for now
    │   ├── NameMissing              there is nothing under this name
    │   ├── NameTaken                an exclusive write found the name in use
    │   └── DamagedError             bytes are there, but not the ones the manifest promises
    ├── TeacherError                 a teacher does not answer, whatever was tried
    │   └── RefusedError                 it will not answer this one request
    ├── EngineError                  another program that answers for us (vLLM) ended too soon
    ├── SchedulerError               Slurm does not answer, or does not take the job for now
    └── NonFiniteError               the loss or a gradient is NaN or infinite

Exit statuses of every command that works on a task are in `ExitStatus`; nothing else in
baton calls `sys.exit` with a number of its own.
"""

from __future__ import annotations

import enum


class ExitStatus(enum.IntEnum):
    """What a process tells the host side, and all that the host side needs to know."""

    FINISHED = 0
    FAILED = 1
    # sysexits.h calls 75 EX_TEMPFAIL ("try again") and 78 EX_CONFIG.
    HANDED_OVER = 75
    STOP = 78


class BatonError(Exception):
    """Base of everything baton raises on purpose. `str()` is written for the person reading it."""

    exit_status = ExitStatus.FAILED


class StopError(BatonError):
    """Running the same command again cannot help."""

    exit_status = ExitStatus.STOP


class ConfigError(StopError):
    """One or more problems in a configuration; `problems` holds one line each."""

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(StopError):
    """The input data cannot be used as the experiment asks."""


class ModelError(StopError):
    """A model or tokenizer cannot be found, loaded or used."""


class FencedError(StopError):
    """Another leg owns this task."""


class CollapsedError(StopError):
    """What a model writes got so much worse that training on would be in vain."""


class NewerSchemaError(StopError):
    """A record was written by a newer baton."""


class NoProgressError(StopError):
    """Three legs in a row left nothing durable behind."""


class StoreError(BatonError):
    """Reading or writing a store failed."""


class StoreRefused(StoreError, StopError):
    """A store does not know us, lets us not in, or has no such bucket or repository."""

    exit_status = ExitStatus.STOP


class StoreBusy(StoreError):
    """A store is overloaded, broken or out of reach for now; later it may take the same."""


class NameMissing(StoreError):
    """There is nothing under this name."""


class NameTaken(StoreError):
    """An exclusive write found the name in use."""


class DamagedError(StoreError):
    """Bytes are there, but not the ones the manifest promises."""


class TeacherError(BatonError):
    """A teacher does not answer, whatever was tried."""


class RefusedError(TeacherError):
    """A teacher will not answer this one request: it is too long, or against its rules."""


class EngineError(BatonError):
    """Another program that writes answers for us ended before it was done."""


class SchedulerError(BatonError):
    """Slurm does not answer, or does not take the job for now."""


class NonFiniteError(BatonError):
    """The loss or a gradient is NaN or infinite."""
