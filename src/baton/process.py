"""How the process of a leg is set up before anything slow is imported: signals, threads, log."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from baton.config.site import load_site
from baton.errors import ConfigError
from baton.handover import StopSignal


def listen() -> StopSignal:
    """Take over the stop signals; the grace is what the host side says it is."""
    text = os.environ.get("BATON_GRACE_SECONDS", "30")
    try:
        grace = float(text)
    except ValueError:
        raise ConfigError(f"BATON_GRACE_SECONDS={text}: expected a number of seconds") from None
    return StopSignal(grace_seconds=grace).install()


def limit_threads(site: str) -> None:
    """Compute with as many threads as the site's other legs, before torch is imported."""
    # Whoever starts a leg on another machine has said so, and has no site file there.
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(load_site(site).threads)


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
