"""A request goes on at this gateway, after output that its client has from another one.

The tokens say all there is to know: sampling depends on the seed and the position alone, and the
state of the text (an incomplete character, the beginning of a stop string) follows from them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from kvbaton.errors import InvalidRequestError
from kvbaton.protocol import Resume
from kvbaton.sampling import SamplingParams
from services.gateway.backend import TokenEvent
from services.gateway.generation import TextOutput

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")
_FINISH_REASONS = (None, "stop", "length")
_MAX_TOKENS_ON_LOOP = 128  # about a millisecond of text: above it the loop is not kept waiting


def most_tokens(
    sampling: SamplingParams, num_prompt_tokens: int, max_model_len: int | None
) -> int | None:
    """How many tokens of output there can be; None: not known."""
    limits = [sampling.max_tokens, max_model_len and max_model_len - num_prompt_tokens]
    return min((limit for limit in limits if limit is not None), default=None)


def check_resume(resume: Resume, vocab_size: int, most: int | None) -> None:
    """Raise InvalidRequestError, naming the field, for what no gateway can have sent."""
    if not _REQUEST_ID.fullmatch(resume.request_id):
        raise InvalidRequestError(
            "resume.request_id is that of `accepted`, 32 hexadecimal digits",
            field="resume.request_id",
        )
    if resume.finish_reason not in _FINISH_REASONS or (resume.finish_reason and not resume.tokens):
        raise InvalidRequestError(
            "resume.finish_reason is stop or length, of the last of resume.tokens",
            field="resume.finish_reason",
        )
    if most is not None and len(resume.tokens) > most:
        raise InvalidRequestError(
            f"resume.tokens has {len(resume.tokens)} tokens, the request at most {most}",
            field="resume.tokens",
        )
    for token_id in (min(resume.tokens, default=0), max(resume.tokens, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"resume.tokens has token id {token_id}, the model's are 0 to {vocab_size - 1}",
                field="resume.tokens",
            )


async def take_in(
    resume: Resume, output: TextOutput, sampling: SamplingParams, most: int | None
) -> str | None:
    """Give `output` the tokens that have been sent. Returns why it ends with them, or None.

    Raises InvalidRequestError (resume.tokens) if they go on after a stop string.
    """
    tokens = resume.tokens
    if resume.finish_reason is not None:
        return resume.finish_reason
    if tokens and tokens[-1] in sampling.stop_token_ids:
        return "stop"
    if len(tokens) == most:
        return "length"
    if len(tokens) <= _MAX_TOKENS_ON_LOOP:
        return _replay(output, tokens)
    return await asyncio.to_thread(_replay, output, tokens)


def _replay(output: TextOutput, tokens: Sequence[int]) -> str | None:
    for index, token_id in enumerate(tokens):
        finish_reason = output.add(TokenEvent(index, token_id)).finish_reason
        if finish_reason is not None and index < len(tokens) - 1:
            raise InvalidRequestError(
                f"resume.tokens goes on after a stop string, complete with token {index}",
                field="resume.tokens",
            )
        if finish_reason is not None:
            return finish_reason
    return None
