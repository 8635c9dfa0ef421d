"""The members of a store that a process was before, until the store knows that they stopped."""

from __future__ import annotations

import structlog

from common.messages import Stopped
from common.net.link import Link
from common.service import Tasks
from kvbaton.errors import KvbatonError

log = structlog.get_logger()


class FormerIds:
    """Member ids under which a store may still hold something back."""

    def __init__(self) -> None:
        self._member_ids: list[str] = []

    def add(self, member_id: str) -> None:
        """This process is another member from now on."""
        self._member_ids.append(member_id)

    def say_stopped(self, link: Link, tasks: Tasks) -> None:
        """Nothing that they did goes on. What the store does not confirm is said again the next
        time."""
        for member_id in self._member_ids:
            tasks.spawn(self._say(link, member_id), "stopped")

    async def _say(self, link: Link, member_id: str) -> None:
        try:
            await link.call(Stopped(member_id=member_id))
        except KvbatonError as error:
            log.info("stopped_not_said", store=link.endpoint, reason=error.message)
        else:
            if member_id in self._member_ids:
                self._member_ids.remove(member_id)
