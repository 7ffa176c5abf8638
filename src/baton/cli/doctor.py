"""`baton doctor`: is a site fit to run on?"""

from __future__ import annotations

import sys

import click

from baton.cli.options import SITE, STORE
from baton.cli.target import open_place


@click.command()
@SITE
@STORE
def doctor(site: str, store: str | None) -> None:
    """Check a site from here, and say what to mend."""
    from baton.config.site import load_site
    from baton.doctor import examine, exit_status

    findings = []
    for finding in examine(load_site(site), open_place(site, store)):
        findings.append(finding)
        click.echo(finding.text)
    sys.exit(exit_status(findings))
