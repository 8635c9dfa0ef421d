"""Runs kvbaton's services on one host: names and ports, the keeper, and `scripts/serve`."""
