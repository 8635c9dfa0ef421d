"""`scripts/gpu_check`: does the engine compute on a GPU what it computes on a CPU, and how fast."""
