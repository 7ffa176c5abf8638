"""Training data: reading files, cleaning rows, splitting them, turning them into tokens."""
