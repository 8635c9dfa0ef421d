"""One token before a worker joins: what loads need not compute."""

from __future__ import annotations

from common.config import StartError
from common.engine.work import Engine, Work
from common.kv.arena import LiveDisk
from kvbaton.sampling import SamplingParams


async def self_test(engine: Engine) -> None:
    """Have the engine compute a token, in a block of private memory that it lets go of when it is
    attached to another. Raises what the engine raises, and StartError if it is no token."""
    engine.attach(LiveDisk().reserve(engine.info.layout.block_bytes))
    work = Work(
        tokens=[0],
        num_prompt_tokens=1,
        start=0,
        num_tokens=1,
        slots=[0],
        sampling=SamplingParams(temperature=0.0),
    )
    (sampled,) = await engine.step([work])
    if work.error is not None or sampled is None:
        raise StartError(f"the engine gave no token: {work.error}")
    if not 0 <= sampled.token_id < engine.info.vocab_size:
        raise StartError(f"the engine gave token {sampled.token_id}, which is not in the model")
