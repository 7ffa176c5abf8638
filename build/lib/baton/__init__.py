"""Containerized, preemption-safe LLM training jobs for Slurm, Docker and a laptop."""

__version__ = "0.1.0"
