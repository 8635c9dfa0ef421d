"""Grammars of structured output, in llguidance's own form: who may ask for one, and how much of it.

The gateway checks a grammar against the same limits that the engine compiles it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLParserLimits, LLTokenizer

from kvbaton.errors import InvalidRequestError

# What they are for is in docs/decisions/structured-output.md. Errors do not repeat the grammar,
# which is its client's own.
LIMITS = LLParserLimits(
    max_grammar_size=10_000,
    initial_lexer_fuel=200_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)


def load_tokenizer(folder: Path, eos: Sequence[int]) -> LLTokenizer:
    """The tokens of a model's folder as llguidance wants them; a second for 150,000 of them.

    Raises InvalidRequestError (grammar): a model without a tokenizer, or without an end of
    sequence, follows no grammar.
    """
    if not eos:
        raise InvalidRequestError(
            "grammar: this model has no end-of-sequence token to end a sentence with",
            field="grammar",
        )
    try:
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(text, eos_token=list(eos))
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            "grammar: this model has no tokenizer.json that could be used for it", field="grammar"
        ) from error
