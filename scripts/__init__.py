"""Maintenance scripts; run them from the repository root, as in `python -m scripts.NAME`."""
