"""Which launcher a site means: the one place that asks."""

from __future__ import annotations

from baton.config.docker_site import DockerSite
from baton.config.site import LocalSite, Site
from baton.handover import StopSignal
from baton.launchers.base import Launcher


def launcher_for(
    site: Site, *, stop: StopSignal | None = None, max_parallel: int | None = None
) -> Launcher:
    """The launcher of a site; `stop` ends a launcher that waits for its tasks."""
    if isinstance(site, LocalSite):
        from baton.launchers.local import LocalLauncher

        return LocalLauncher(site, stop or StopSignal(), max_parallel)
    if isinstance(site, DockerSite):
        from baton.launchers.docker import DockerLauncher

        return DockerLauncher(site, stop or StopSignal(), max_parallel)
    from baton.launchers.slurm import SlurmLauncher

    return SlurmLauncher(site, max_parallel)
