"""T5 from random weights on millions of prompt-response pairs: data, train, eval."""
