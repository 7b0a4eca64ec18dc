"""Fuzzing: mutated inputs of every kind that a stranger may send. `python -m tests.fuzz --help`."""
