"""Which tokens may follow, by a sequence's grammar. The state is replayed from its tokens.

Nothing of a grammar's state is kept that the tokens do not tell: whoever computes the next token,
first or again, comes to the same state. What is kept here only saves replaying.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from common.engine.work import Work
from common.grammar import LIMITS, load_tokenizer
from kvbaton.errors import InvalidRequestError

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]

_MAX_COMPILED = 64
_MAX_STATES = 256  # with more sequences than this at once, each token replays its whole output

K = TypeVar("K")


class Grammars:
    """The grammars of the sequences of one model."""

    def __init__(self, folder: Path, eos: tuple[int, ...]) -> None:
        """A model that can follow no grammar refuses those who ask."""
        self._eos = frozenset(eos)
        self._tokenizer: LLTokenizer | InvalidRequestError
        try:
            self._tokenizer = load_tokenizer(folder, eos)
        except InvalidRequestError as error:
            self._tokenizer = error
        self._lock = threading.Lock()  # of what is compiled; never held while compiling
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._states: OrderedDict[tuple[str, tuple[int, ...]], LLMatcher] = OrderedDict()

    def prepare(self, grammar: str) -> None:
        """Compile a grammar that will be asked for soon. May run beside everything else here.
        Raises InvalidRequestError (grammar)."""
        self._first_state(grammar)

    def allowed(self, work: Work, vocab_size: int) -> BoolArray | None:
        """Whether each token of the model may follow, [vocab_size]; None for all of them: without a
        grammar, and after an end of sequence that the request ignores, as in vLLM.

        A sentence that is complete and cannot go on is followed by an end of sequence alone. Raises
        InvalidRequestError (grammar) for a grammar that cannot be followed this far.
        """
        grammar = work.sampling.grammar
        output = tuple(work.tokens[work.num_prompt_tokens : work.end])
        if not grammar or not self._eos.isdisjoint(output):
            return None
        matcher = self._state(grammar, output)
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise _refused("following it takes more than this server's limits")
        # Ids that the model has and its tokenizer has not are the zeros that this fills up with.
        allowed: BoolArray = np.unpackbits(mask, count=vocab_size, bitorder="little").view(np.bool_)
        _keep(self._states, (grammar, output), matcher, _MAX_STATES)
        return allowed

    def _state(self, grammar: str, output: tuple[int, ...]) -> LLMatcher:
        """The grammar's state after `output`; it belongs to the caller."""
        if (known := self._states.pop((grammar, output), None)) is not None:
            return known
        former = self._states.pop((grammar, output[:-1]), None) if output else None
        matcher = former or self._first_state(grammar).deep_copy()
        matcher.consume_tokens(list(output[-1:] if former else output))
        if matcher.is_error():
            raise _refused(
                "the output so far is not the beginning of one of its sentences, or following it "
                "takes more than this server's limits"
            )
        return matcher

    def _first_state(self, grammar: str) -> LLMatcher:
        with self._lock:
            matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = self._compile(grammar)
        with self._lock:
            _keep(self._compiled, grammar, matcher, _MAX_COMPILED)
        return matcher

    def _compile(self, grammar: str) -> LLMatcher:
        if isinstance(self._tokenizer, InvalidRequestError):
            raise self._tokenizer
        matcher = LLMatcher(self._tokenizer, grammar, limits=LIMITS, log_level=0)
        if matcher.is_error():
            raise _refused("it is not valid, or larger than this server's limits")
        return matcher


def _keep(kept: OrderedDict[K, LLMatcher], key: K, matcher: LLMatcher, most: int) -> None:
    """Keep the matcher as the newest of at most so many."""
    kept[key] = matcher
    if len(kept) > most:
        kept.popitem(last=False)


def _refused(why: str) -> InvalidRequestError:
    # Without llguidance's own words: they may repeat parts of the grammar, and this is logged.
    return InvalidRequestError(f"grammar: {why}", field="grammar")
