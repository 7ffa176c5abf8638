"""Distil a teacher's grounded, structured answers: question and documents in, reasoning out."""
