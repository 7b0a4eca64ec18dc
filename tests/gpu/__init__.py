"""What can be checked on a GPU only: `python -m tests.gpu`."""
