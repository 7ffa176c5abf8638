"""questions_gen: a generator of competition mathematics problems."""
