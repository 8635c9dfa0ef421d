"""The best place for a request in the fleet as it is now."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from common.kv.hashing import prompt_keys, root_key
from common.kv.layout import KvLayout
from common.seams import Clock
from kvbaton.errors import UnavailableError
from services.gateway.backend import GenerationRequest, Targets
from services.gateway.routing.assignment import Place
from services.gateway.routing.candidates import Wanted
from services.gateway.routing.decision import Decision
from services.gateway.routing.fleet import Fleet
from services.gateway.routing.peers import Placeable, Store, Worker
from services.gateway.routing.placement import choose, choose_shard
from services.gateway.routing.stream import RequestStream

_ANSWER_TOKENS = 128  # what an answer is taken for, at most: few say how long theirs will be
_MAX_SESSIONS = 4096


@dataclass(frozen=True, slots=True)
class Routing:
    """How requests are placed. `targets` are those of requests that name none. With `refuses_late`
    one is not taken if its target for the first token cannot be met. A decode worker computes up
    to `max_local_tokens` of a prompt itself where that is sooner and, unless they are 0, any number
    where targets for the time per token pace it, or moving its KV would take longer. With
    `local_decode` a prefill worker decodes what it computed where decode is at its limit."""

    mode: str = "disaggregated"
    targets: Targets = Targets()
    refuses_late: bool = False
    max_local_tokens: int = 0
    local_decode: bool = True

    def targets_of(self, request: GenerationRequest) -> Targets:
        """What the request asks for, or else what the server is meant to do."""
        return request.targets.or_else(self.targets)


def owner_of(request: GenerationRequest) -> str:
    """Whose request it is, among whom all are treated alike."""
    return request.owner or request.tenant


class Chooser:
    """Applies placement.py to the live fleet of one gateway."""

    def __init__(self, fleet: Fleet, clock: Clock, routing: Routing) -> None:
        self.routing = routing
        self._fleet = fleet
        self._clock = clock
        self._is_colocated = routing.mode == "colocated"
        self._sessions: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()

    @property
    def has_place(self) -> bool:
        """Whether any request can be served."""
        return any(self.has_workers(store) for store in self._fleet.stores)

    def has_workers(self, store: Store) -> bool:
        """Whether a request can be served with this store."""
        roles = ("decode",) if self._is_colocated else ("prefill", "decode")
        return store.is_up and all(self._fleet.of_role(role, store) for role in roles)

    def unavailable(self) -> UnavailableError:
        """What is missing, in words."""
        for store in self._fleet.stores:
            if not store.is_up:
                return UnavailableError("the KV store cannot be reached", retry_after_s=1)
        roles = [worker.member.role for worker in self._fleet.workers.values()]
        missing = "decode" if "decode" not in roles else "prefill"
        return UnavailableError(f"no {missing} worker is alive", retry_after_s=1)

    def prefillers(self) -> list[Worker]:
        """Whoever computes prompts and takes new work."""
        return self._of_role("decode" if self._is_colocated else "prefill")

    def helpers(self) -> list[Worker]:
        """Decode workers that may compute long prompts, as all that they have keep them in check
        by targets."""
        if self._is_colocated or not self.routing.max_local_tokens:
            return []
        return [each for each in self._of_role("decode") if math.isfinite(each.tpot_limit_s)]

    def choose(self, stream: RequestStream, tried: set[Worker]) -> tuple[Place, Decision]:
        """Where to serve a request now; workers in `tried` come last. Raises UnavailableError."""
        stores = [store for store in self._fleet.stores if self.has_workers(store)]
        if not stores:
            raise self.unavailable()
        member = self._fleet.of_role("decode", stores[0])[0].member
        layout, request, now = member.layout, stream.request, self._clock.now()
        assert layout is not None
        first_block = request.prompt[: layout.block_size]
        store = self._fleet.stores[choose_shard(first_block, [store.index for store in stores])]
        tokens = [*request.prompt, *stream.tokens]
        root = root_key(
            store.welcome.cache_secret, request.tenant, member.fingerprint, stream.cache_salt
        )
        keys = prompt_keys(root, tokens, layout.block_size)
        # The last position is always computed: the first token is drawn from its logits.
        num_usable = (len(tokens) - 1) // layout.block_size
        found = keys[: min(store.prefixes.num_found(keys), num_usable)]
        wanted = self._wanted(stream, len(tokens), layout, len(found), now)
        prefills = [] if self._is_colocated else self._candidates("prefill", store, tried)
        choice = choose(
            wanted,
            self._as_seen(prefills, store, found, layout.block_size, now),
            self._as_seen(
                self._candidates("decode", store, tried), store, found, layout.block_size, now
            ),
            now,
            max_local_tokens=None if self._is_colocated else self.routing.max_local_tokens,
        )
        place = Place(
            store,
            choice.prefill.worker,
            choice.decode.worker,
            root_key=root,
            tokens=tokens,
            keys=keys,
            num_cached=wanted.num_cached,
        )
        return place, choice.decision

    def placed(self, request: GenerationRequest, place: Place) -> None:
        """The request is served there; others of its session like to be, too."""
        if request.session_id:
            session = owner_of(request), request.session_id
            self._sessions[session] = (place.prefill.member.name, place.decode.member.name)
            self._sessions.move_to_end(session)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _of_role(self, role: str) -> list[Worker]:
        workers = (self._fleet.of_role(role, store) for store in self._fleet.stores)
        return list(dict.fromkeys(worker for of_store in workers for worker in of_store))

    def _wanted(
        self, stream: RequestStream, num_tokens: int, layout: KvLayout, num_found: int, now: float
    ) -> Wanted:
        request, targets = stream.request, self.routing.targets_of(stream.request)
        return Wanted(
            num_tokens=num_tokens,
            num_cached=num_found * layout.block_size,
            token_bytes=layout.block_bytes // layout.block_size,
            num_answer_tokens=min(request.sampling.max_tokens or _ANSWER_TOKENS, _ANSWER_TOKENS),
            ttft_target_s=targets.ttft_ms / 1000,
            tpot_target_s=targets.tpot_ms / 1000,
            waited_s=now - stream.timeline.received_at,
            session=self._sessions.get((owner_of(request), request.session_id), ()),
        )

    def _candidates(self, role: str, store: Store, tried: set[Worker]) -> list[Worker]:
        workers = self._fleet.of_role(role, store)
        return [worker for worker in workers if worker not in tried] or workers

    def _as_seen(
        self, workers: list[Worker], store: Store, found: list[bytes], block_size: int, now: float
    ) -> list[Placeable]:
        movers = [worker.number for worker in workers if worker.moves(store)]
        num_held = store.prefixes.num_held(found, movers)
        keeps = self.routing.local_decode
        return [
            worker.candidate(
                store, num_held.get(worker.number, 0) * block_size, now, may_keep=keeps
            )
            for worker in workers
        ]
