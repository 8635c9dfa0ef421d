"""The workers and stores of a cluster as one gateway knows them: a link to each, what it reported,
and what this gateway has given it."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.incarnations import FormerIds
from common.messages import Load, Member, Welcome
from common.net.link import Link
from services.gateway.placement import Candidate


@dataclass(slots=True, eq=False)
class Worker:
    """A prefill or decode worker. It is another member of each store: `member_ids` by store."""

    member: Member
    link: Link
    member_ids: dict[int, str] = field(default_factory=dict)
    load: Load = Load()
    num_assigned: int = 0  # sequences that this gateway has there
    num_tokens_assigned: int = 0  # prompt tokens it still has to compute for this gateway
    num_placed: int = 0
    is_known: bool = False  # to the worker: it has welcomed us
    is_lost: bool = False  # the connection ended, and has not come back yet

    def candidate(self) -> Placeable:
        """The worker for placement."""
        load = self.load
        return Placeable(
            name=self.member.name,
            num_sequences=max(self.num_assigned, load.num_running + load.num_waiting),
            num_tokens_queued=max(self.num_tokens_assigned, load.num_tokens_queued),
            tokens_per_s=load.tokens_per_s,
            max_num_seqs=self.member.max_num_seqs,
            num_placed=self.num_placed,
            worker=self,
        )


@dataclass(slots=True)
class Placeable(Candidate):
    """A candidate that knows its worker."""

    worker: Worker


@dataclass(slots=True, eq=False)
class Store:
    """A KV store. Up from its welcome until it stops answering."""

    index: int
    link: Link = field(init=False)
    welcome: Welcome = Welcome(instance_id="")
    is_up: bool = False
    member_id: str = ""
    former_ids: FormerIds = field(default_factory=FormerIds)
    blocks: dict[str, int] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    handoffs: dict[str, int] = field(default_factory=dict)
    num_handoffs: int = 0
    num_waiting: int = 0
