"""YAML files into frozen dataclasses, with every problem of a file reported at once."""
