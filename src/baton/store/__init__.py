"""Where bytes live: a folder today, behind six methods that every store has."""
