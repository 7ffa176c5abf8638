"""Evaluation: generate answers, score them, say how sure the scores are."""
