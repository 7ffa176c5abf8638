"""The options that several commands share."""

from __future__ import annotations

import click

SET = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a value of the experiment, e.g. train.epochs=1; may be repeated.",
)
STORE = click.option("--store", metavar="URL", help="Where bytes live; overrides the site's store.")
SITE = click.option("--site", default="local", show_default=True, help="A file in launch/.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
