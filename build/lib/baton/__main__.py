"""`python -m baton` is `baton`."""

from baton.cli import main

main()
