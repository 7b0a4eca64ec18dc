"""PyCUDA where it is not installed: see driver.py."""
