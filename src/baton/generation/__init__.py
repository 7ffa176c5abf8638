"""Answers of a causal model to many prompts at once, from a paged cache."""
