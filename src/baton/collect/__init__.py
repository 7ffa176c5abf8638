"""The eval records of one experiment as a CSV, three plots and one page, and what is missing."""

from baton.collect.results import Collected, collect

__all__ = ["Collected", "collect"]
