"""Plans as they lie in a store, below `<experiment>/<digest>/plan.json`."""

from __future__ import annotations

import contextlib
from pathlib import Path

from baton.errors import ConfigError, DamagedError, NameTaken
from baton.plan import pin
from baton.record import Plan
from baton.store.local import LocalStore

FILE = "plan.json"


def path_of(root: Path, plan: Plan) -> Path:
    """Where a plan lies in the store at `root`, whether or not it was frozen."""
    return root / plan.experiment / plan.digest / FILE


def read(path: Path) -> Plan:
    """A frozen plan. Raises `ConfigError`: running again cannot mend a damaged one."""
    try:
        return Plan.from_json(path.read_bytes(), where=str(path))
    except FileNotFoundError:
        raise ConfigError(f"there is no plan {path}") from None
    except OSError as error:
        raise ConfigError(f"reading the plan {path}: {error.strerror or error}") from error
    except DamagedError as error:
        raise ConfigError(
            f"{error}; move it away and submit again: it will be written anew"
        ) from error


def freeze(plan: Plan, root: Path) -> Path:
    """Write a plan unless it is there, with what must be looked up once.

    Raises:
        ModelError, DataError: a hub is out of reach, or has no such thing.
    """
    path = path_of(root, plan)
    if not path.exists():
        # The elements of an array may all freeze at once: the first one's plan is everybody's.
        with contextlib.suppress(NameTaken):
            LocalStore(path.parent).write(FILE, pin(plan).to_json(), exclusive=True)
    return path


def root_of(path: Path, plan: Plan) -> Path:
    """The store that a plan's file lies in.

    Raises:
        ConfigError: it does not lie where a store would keep it.
    """
    inside = Path(plan.experiment, plan.digest, FILE)
    found = path.absolute()
    if found.parts[-len(inside.parts) :] != inside.parts:
        raise ConfigError(f"{path} does not lie in a store (…/{inside}); name the store by --store")
    return found.parents[len(inside.parts) - 1]


def versions(root: Path, experiment: str) -> list[str]:
    """Digests of every plan of an experiment in a store."""
    return [path.parent.name for path in sorted((root / experiment).glob(f"*/{FILE}"))]
