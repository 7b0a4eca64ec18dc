"""Faults that the tests must notice: `make mutants`."""
