"""`audit` and `why`: whether the books close, and what happened to what."""

from __future__ import annotations

import argparse
import re

from kvbaton.commands.options import CannotAskError, operator_of, show
from kvbaton.tables import audit_parts, why_parts

EXIT_CANNOT_ASK = 2
_BLOCK = re.compile(r"(?:(\d{1,4}):)?(\d{1,9})")


async def audit(options: argparse.Namespace) -> int:
    """Returns 0 if the books close, 1 if not, 2 if a store could not be asked."""
    async with operator_of(options) as operator:
        answer = await operator.audit()
    show(answer, audit_parts(answer), as_json=options.json)
    if any(store.problem for store in answer.stores):
        return EXIT_CANNOT_ASK
    return 0 if answer.closes else 1


async def why(options: argparse.Namespace) -> int:
    """Returns 0 if something is remembered, 1 if not."""
    match = None if options.request else _BLOCK.fullmatch(options.what)
    async with operator_of(options) as operator:
        if match is None:
            answer = await operator.why(name=options.what)
        else:
            store, block = match.groups()
            number = None if store is None else int(store)
            answer = await operator.why(block=int(block), store=number)
    show(answer, why_parts(answer), as_json=options.json)
    if problems := [each.problem for each in answer.stores if each.problem]:
        raise CannotAskError(f"not every KV store could be asked: {problems[0]}")
    return 0 if any(store.events for store in answer.stores) else 1
