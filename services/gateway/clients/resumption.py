"""A request goes on at this gateway, after output that its client has from another one.

The tokens say all there is to know: sampling depends on the seed and the position alone, and the
state of the text (an incomplete character, the beginning of a stop string) follows from them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

from kvbaton.errors import InvalidRequestError
from kvbaton.protocol import Resume, Resumed
from kvbaton.sampling import SamplingParams
from services.gateway.backend import TokenEvent
from services.gateway.text.generation import TextOutput

_REQUEST_ID = re.compile(r"[0-9a-f]{32}")
_FINISH_REASONS = (None, "stop", "length")
_MAX_TOKENS_ON_LOOP = 128  # about a millisecond of text: above it the loop is not kept waiting


def most_tokens(
    sampling: SamplingParams, num_prompt_tokens: int, max_model_len: int | None
) -> int | None:
    """How many tokens of output there can be; None: not known."""
    limits = [sampling.max_tokens, max_model_len and max_model_len - num_prompt_tokens]
    return min((limit for limit in limits if limit is not None), default=None)


def check_resume(
    resume: Resume, choices: Sequence[Resumed], vocab_size: int, most: int | None
) -> None:
    """Raise InvalidRequestError, naming the field, for what no gateway can have sent. `choices` is
    the output of each that is in it."""
    if not _REQUEST_ID.fullmatch(resume.request_id):
        raise InvalidRequestError(
            "resume.request_id is that of `accepted`, 32 hexadecimal digits",
            field="resume.request_id",
        )
    for index, each in enumerate(choices):
        where = f"resume.choices[{index}]" if resume.choices else "resume"
        _check_output(each, where, vocab_size, most)


def _check_output(output: Resumed, where: str, vocab_size: int, most: int | None) -> None:
    tokens = output.tokens
    if output.finish_reason not in _FINISH_REASONS or (output.finish_reason and not tokens):
        raise InvalidRequestError(
            f"{where}.finish_reason is stop or length, of the last of {where}.tokens",
            field=f"{where}.finish_reason",
        )
    field = f"{where}.tokens"
    if most is not None and len(tokens) > most:
        raise InvalidRequestError(
            f"{field} has {len(tokens)} tokens, the request at most {most}", field=field
        )
    for token_id in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{field} has token id {token_id}, the model's are 0 to {vocab_size - 1}",
                field=field,
            )


async def take_in(
    resumed: Resumed, output: TextOutput, sampling: SamplingParams, most: int | None
) -> tuple[str, str | None]:
    """Give `output` the tokens that have been sent. Returns their text, and why the output ends
    with them, or None.

    Raises InvalidRequestError (resume.tokens) if they go on after a stop string.
    """
    tokens, finish_reason = resumed.tokens, resumed.finish_reason
    if finish_reason is None and tokens and tokens[-1] in sampling.stop_token_ids:
        finish_reason = "stop"
    if finish_reason is None and tokens and len(tokens) == most:
        finish_reason = "length"
    if len(tokens) <= _MAX_TOKENS_ON_LOOP:
        return _replay(output, tokens, finish_reason)
    return await asyncio.to_thread(_replay, output, tokens, finish_reason)


def _replay(
    output: TextOutput, tokens: Sequence[int], finish_reason: str | None
) -> tuple[str, str | None]:
    last = len(tokens) - 1
    texts = []
    for index, token_id in enumerate(tokens):
        reason = finish_reason if index == last else None
        token = output.add(TokenEvent(index, token_id, finish_reason=reason))
        texts.append(token.text)
        if token.finish_reason is not None and index < last:
            raise InvalidRequestError(
                f"resume.tokens goes on after a stop string, complete with token {index}",
                field="resume.tokens",
            )
        if reason is None:
            finish_reason = finish_reason or token.finish_reason
    return "".join(texts), finish_reason
