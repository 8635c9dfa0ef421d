"""The commands of `python -m kvbaton`."""
