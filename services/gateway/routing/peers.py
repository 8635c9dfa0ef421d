"""The workers and stores of a cluster as one gateway knows them: a link to each, what it reported,
and what this gateway has given it."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from common.incarnations import FormerIds
from common.messages import Load, Member, Welcome, WorkerCounts
from common.net.link import Link
from services.gateway.routing.candidates import Candidate
from services.gateway.routing.estimates import GUESSED_PROMPT_STEPS, Backlog
from services.gateway.routing.prefixes import PrefixIndex


@dataclass(slots=True)
class Assigned:
    """A request that a worker has from this gateway. `tpot_target_s` inf: none."""

    num_tokens: int
    tpot_target_s: float
    is_awaited: bool = True  # its first token is still to come


@dataclass(slots=True, eq=False)
class Worker:
    """A prefill or decode worker. It is another member of each store: `member_ids` by store."""

    member: Member
    link: Link
    number: int = 0  # of all that this gateway has met
    member_ids: dict[int, str] = field(default_factory=dict)
    load: Load = Load()
    reported_at: float = 0.0  # its load, on our clock
    counts: WorkerCounts = field(default_factory=WorkerCounts)
    assigned: dict[Hashable, Assigned] = field(default_factory=dict)  # what it decodes for us
    backlog: Backlog = field(default_factory=Backlog)  # what it computes for us, no token yet
    num_placed: int = 0
    is_known: bool = False  # to the worker: it has welcomed us
    is_lost: bool = False  # the connection ended, and has not come back yet

    def report(self, load: Load, now: float) -> None:
        """It has said how busy it is, to us or, perhaps before that, to a store."""
        if load.num_steps >= self.load.num_steps:
            self.load, self.reported_at = load, now

    def joined(self, store: Store, member_id: str) -> None:
        """A store lists it by this id. A new one may be a new process's, which counts anew."""
        if self.member_ids.get(store.index) != member_id:
            self.load, self.counts = Load(), WorkerCounts()
        self.member_ids[store.index] = member_id

    def moves(self, store: Store) -> bool:
        """Whether blocks must come to it from the store."""
        if self.member.mover == "auto":
            return self.member.host_id != store.welcome.host_id
        return self.member.mover == "zmq"

    @property
    def tpot_limit_s(self) -> float:
        """The strictest target of what it decodes for this gateway; inf: none."""
        return min((each.tpot_target_s for each in self.assigned.values()), default=math.inf)

    def backlog_s(self) -> float:
        """How long what this gateway has there takes until its last first token."""
        return self.backlog.seconds(self.load.prompt_steps or GUESSED_PROMPT_STEPS)

    def candidate(self, store: Store, num_held: int, now: float, *, may_keep: bool) -> Placeable:
        """The worker for placement; `num_held`: of the request's cached tokens, those there.
        `may_keep`: a prefill worker may decode what it has computed, if it can."""
        load, assigned = self.load, self.assigned.values()
        queued_s = load.queued_s - (now - self.reported_at)
        is_prefill = self.member.role == "prefill"
        num_reported = load.num_decoding if is_prefill else load.num_running + load.num_waiting
        return Placeable(
            name=self.member.name,
            num_sequences=max(len(assigned), num_reported),
            num_awaited=sum(each.is_awaited for each in assigned),
            max_num_seqs=self.member.max_num_seqs,
            num_context_tokens=max(
                sum(each.num_tokens for each in assigned), load.num_context_tokens
            ),
            backlog=self.backlog,
            others_s=max(0.0, queued_s - self.backlog_s()),
            prompt_steps=load.prompt_steps,
            token_steps=load.token_steps,
            moves=self.moves(store),
            bytes_per_s=load.pulled_bytes_per_s,
            pushed_bytes_per_s=load.pushed_bytes_per_s,
            num_held=num_held,
            paced_token_s=load.paced_token_ms / 1000,
            tpot_limit_s=self.tpot_limit_s,
            may_keep=may_keep and is_prefill and self.member.decodes,
            num_placed=self.num_placed,
            worker=self,
        )


@dataclass(slots=True)
class Placeable(Candidate):
    """A candidate that knows its worker."""

    worker: Worker = field(kw_only=True)


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
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    num_handoffs: int = 0
    num_waiting: int = 0
