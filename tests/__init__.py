"""The tests; a package, so that `python -m tests.gpu` finds this folder and no other of that name."""
