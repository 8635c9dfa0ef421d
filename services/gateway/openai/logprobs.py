"""Log probabilities as JSON can carry them."""

from __future__ import annotations

_LOWEST = -9999.0  # what vLLM shows for a token that cannot be


def finite(logprob: float) -> float:
    """The logprob, or a very low number for minus infinity, which JSON does not have."""
    return max(logprob, _LOWEST)
