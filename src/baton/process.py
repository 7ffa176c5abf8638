"""How the process of a leg is set up before anything slow is imported: signals, threads, log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from baton.config.site import load_site
from baton.errors import ConfigError, ExitStatus, StoreBusy
from baton.handover import StopSignal
from baton.store.patience import Patience

# How long a leg waits for a store in trouble where it can do nothing without it. One that trains
# goes on training, however long it lasts.
_STORE_SECONDS = 300.0


def listen() -> StopSignal:
    """Take over the stop signals; the grace is what the host side says it is."""
    text = os.environ.get("BATON_GRACE_SECONDS", "30")
    try:
        grace = float(text)
    except ValueError:
        raise ConfigError(f"BATON_GRACE_SECONDS={text}: expected a number of seconds") from None
    return StopSignal(grace_seconds=grace).install()


def patience_until(stop: StopSignal) -> Patience:
    """Minutes for a remote store in trouble, but none once somebody wants the machine back."""
    return Patience(seconds=_STORE_SECONDS, should_stop=lambda: stop.is_set)


@contextlib.contextmanager
def stopping_is_no_failure(stop: StopSignal) -> Iterator[None]:
    """End as handed over, and not as failed, when a signal cuts the wait for a store short."""
    try:
        yield
    except StoreBusy as error:
        if not stop.is_set:
            raise
        logging.getLogger("baton").warning("%s asked to stop before it began: %s", stop.name, error)
        sys.exit(ExitStatus.HANDED_OVER)


def limit_threads(site: str) -> None:
    """Compute with as many threads as the site's other legs, before torch is imported."""
    # Whoever starts a leg on another machine has said so, and has no site file there.
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(load_site(site).threads)


def warn_of_a_passing_store(root: Path) -> None:
    """Say so when the store lies in a container's own layer, which goes with the container."""
    # The images set it; elsewhere a store on the root's device is as good as any.
    if "BATON_COMMIT" not in os.environ:
        return
    there = next(place for place in (root, *root.parents) if place.exists())
    if there.stat().st_dev == Path("/").stat().st_dev:
        logging.getLogger("baton").warning(
            "the store %s lies in this container and goes with it: mount a volume or a folder"
            " (docker run -v runs:%s …), or name another place with --store",
            root,
            root,
        )


def prepare_gpu_memory() -> None:
    """Let torch grow its pieces of GPU memory: packs of many sizes would leave holes."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def quiet_libraries() -> None:
    """No bar for every weight that is loaded, and none of the libraries' notes to each other."""
    # Read when transformers is imported, which is later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # jieba's


def log_to_stdout() -> None:
    """One line an event, with its time; of other people's loggers, warnings only."""
    quiet_libraries()
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stdout,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    logging.getLogger("baton").setLevel(logging.INFO)
