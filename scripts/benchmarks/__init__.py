"""Benchmarks: one file a case, run by scripts/bench."""
