"""Requests to routes and peers: the cheapest way by what was measured, and another way where one fails.

A token that was given out is never taken back and never lost: whoever goes on gets the prompt and what is out already.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from sparkray.config.handoff import LinkRates, MachineRates, ModelShape, RouteConfig, RouteName
from sparkray.errors import BusyError, SparkrayError, UnavailableError
from sparkray.handoff.client import Peer
from sparkray.handoff.errors import PeerRefusedError, Reason
from sparkray.handoff.handing import Ask, Prefiller, Told, answer, pair
from sparkray.handoff.plan import Work
from sparkray.handoff.policy import Decision, LearnedRate, Sides, choose_route

_logger = logging.getLogger(__name__)
# A peer that failed is left alone for so long.
_REST_SECONDS = 5.0
_MAX_CONVERSATIONS = 4096
# Refusals that say nothing against the peer itself.
_OF_THE_REQUEST = (Reason.CONTEXT, Reason.MALFORMED, Reason.TOO_LARGE)
_FAILURES = (SparkrayError, OSError, EOFError)


@dataclass(slots=True)
class _PeerState:
    peer: Peer
    is_paired: bool = False
    rest_until: float = 0.0
    num_running: int = 0
    pairing: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class _Conversation:
    """Where a conversation's rows lie, and how many tokens they are of."""

    state: _PeerState
    route: RouteName
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A token as it comes.

    Attributes:
        index: its place in the answer.
        token: its id.
        route: how the request goes now.
        verdict: "full", "partial" or "local"; "partial" too where a peer was lost on the way.
        reason: why not "full".
    """

    index: int
    token: int
    route: RouteName
    verdict: str
    reason: str


@dataclass(slots=True)
class Outcome:
    """What is known of a request when it has ended.

    Attributes:
        decision: the route that was chosen at first.
        verdict: as in `Piece`.
        reason: why not "full".
        rows_received: rows that crossed the link.
        rows_cached: rows that the decode side had.
        kv_bytes: payload bytes that crossed the link.
        num_peers_lost: peers that ended before the answer.
        finish_reason: "stop" or "length".
    """

    decision: Decision | None = None
    verdict: str = ""
    reason: str = ""
    rows_received: int = 0
    rows_cached: int = 0
    kv_bytes: int = 0
    num_peers_lost: int = 0
    finish_reason: str = ""


class Coordinator:
    """Answers requests over one prefill side and some decode peers.

    Args:
        prefiller: the prefill side; None: every peer reads its prompts itself.
        peers: decode peers.
        shape: of the model, for the cost model.
        config: when to hand off.
        prefill: first guess of the prefill side's rates.
        decode: first guess of a peer's.
        link: first guess of the link's.
        max_requests: requests at once; further ones are told to come again.
        force: a route that is always taken while it is open; None: the cheapest.
    """

    def __init__(
        self,
        prefiller: Prefiller | None,
        peers: Sequence[Peer],
        *,
        shape: ModelShape,
        config: RouteConfig,
        prefill: MachineRates,
        decode: MachineRates,
        link: LinkRates,
        context_tokens: int = 1 << 20,
        max_requests: int = 64,
        force: RouteName | None = None,
    ) -> None:
        self._prefiller = prefiller
        self._peers = [_PeerState(peer) for peer in peers]
        self._shape = shape
        self._config = config
        self._link = link
        self._context_tokens = context_tokens
        self._max_requests = max_requests
        self._force = force
        self._num_running = 0
        self._conversations: OrderedDict[str, _Conversation] = OrderedDict()
        self.prefill_rate = LearnedRate(prefill.prefill_tokens_per_second)
        self.own_prefill_rate = LearnedRate(decode.prefill_tokens_per_second)
        self.decode_rate = LearnedRate(decode.decode_tokens_per_second)
        self.prefill_side_decode_rate = LearnedRate(prefill.decode_tokens_per_second)

    async def answer(self, ask: Ask, outcome: Outcome) -> AsyncGenerator[Piece]:
        """Tokens of one request; `outcome` is filled as it goes on.

        Raises:
            BusyError: too many requests are running.
            UnavailableError: nobody is left who could go on.
            InputError: the prompt fits nowhere.
        """
        if self._num_running >= self._max_requests:
            raise BusyError(f"{self._max_requests} requests are running; try again in a moment.")
        self._num_running += 1
        try:
            async with aclosing(self._answer(ask, outcome)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._num_running -= 1

    def status(self) -> dict[str, object]:
        """Peers and rates as of now."""
        now = time.monotonic()
        return {
            "num_running": self._num_running,
            "num_conversations": len(self._conversations),
            "peers": [
                {
                    "address": state.peer.address,
                    "is_paired": state.is_paired,
                    "is_resting": state.rest_until > now,
                    "num_running": state.num_running,
                }
                for state in self._peers
            ],
        }

    async def _answer(self, ask: Ask, outcome: Outcome) -> AsyncGenerator[Piece]:
        given: list[int] = list(ask.resume)
        failure: BaseException | None = None
        for _ in range(len(self._peers) + 2):
            here = replace(ask, resume=tuple(given))
            state = self._choose_peer(ask.conversation)
            decision = self._decide(here, state)
            outcome.decision = outcome.decision or decision
            if decision.route is None:
                break
            at_peer = state if decision.route != "prefill_node" else None
            # Counted before anything is awaited: requests that come together do not all see the same idle peer.
            if at_peer is not None:
                at_peer.num_running += 1
            try:
                async with aclosing(self._run(decision.route, here, state, outcome)) as pieces:
                    async for piece in pieces:
                        given.append(piece.token)
                        yield piece
                return
            except PeerRefusedError as refusal:
                failure = refusal
                if refusal.reason in _OF_THE_REQUEST:
                    raise
            except _FAILURES as broken:
                failure = broken
            finally:
                if at_peer is not None:
                    at_peer.num_running -= 1
            _logger.warning("a request goes on elsewhere after %d tokens: %r", len(given), failure)
            outcome.num_peers_lost += 1
            outcome.verdict, outcome.reason = "partial", "peer_lost"
            self._conversations.pop(ask.conversation, None)
            if at_peer is None:
                break
            at_peer.is_paired = False
            at_peer.rest_until = time.monotonic() + _REST_SECONDS
        raise UnavailableError(
            f"nobody is left who could answer; {len(given)} tokens are out.",
            hint="Start a decode peer with: sparkray handoff decode.",
        ) from failure

    @property
    def _can_prefill(self) -> bool:
        return self._prefiller is not None and self._prefiller.is_alive

    def _choose_peer(self, conversation: str) -> _PeerState | None:
        """The conversation's peer, or the one with the least to do; None where all rest."""
        now = time.monotonic()
        known = self._conversations.get(conversation) if conversation else None
        if known is not None and known.state.rest_until <= now:
            return known.state
        awake = [state for state in self._peers if state.rest_until <= now]
        return min(awake, key=lambda state: state.num_running, default=None)

    def _decide(self, ask: Ask, state: _PeerState | None) -> Decision:
        known = self._conversations.get(ask.conversation) if ask.conversation else None
        cached = known.num_tokens if known is not None and known.state is state else 0
        work = Work(
            prompt_tokens=len(ask.prompt),
            output_tokens=max(1, ask.max_tokens - len(ask.resume)),
            # What the prefill side has read before, it has cached; only the peer's last answer is new to it.
            cached_prefill=min(cached, len(ask.prompt) - 1),
            cached_decode=min(cached, len(ask.prompt) - 1),
            decode_queue_seconds=(state.num_running / self.decode_rate.rate(1)) if state else 0.0,
        )
        num_tokens = len(ask.prompt)
        prefill = MachineRates(
            name="prefill", source="learned", prefill_tokens_per_second=self.prefill_rate.rate(num_tokens),
            decode_tokens_per_second=self.prefill_side_decode_rate.rate(1),
        )  # fmt: skip
        decode = MachineRates(
            name="decode", source="learned", prefill_tokens_per_second=self.own_prefill_rate.rate(num_tokens),
            decode_tokens_per_second=self.decode_rate.rate(1),
        )  # fmt: skip
        sides = Sides(
            self._shape, prefill if self._can_prefill else None, decode if state is not None else None,
            self._link, context_tokens=self._context_tokens,
        )  # fmt: skip
        decision = choose_route(sides, work, self._config, known.route if known is not None else None)
        if self._force is not None and self._force in decision.times:
            return replace(decision, route=self._force, reason="set by force")
        return decision

    async def _run(
        self, route: RouteName, ask: Ask, state: _PeerState | None, outcome: Outcome
    ) -> AsyncGenerator[Piece]:
        if route == "prefill_node" or state is None:
            async with aclosing(self._at_prefill_node(ask, outcome)) as pieces:
                async for piece in pieces:
                    yield piece
            return
        prefiller = self._prefiller if route == "handoff" else None
        # Why no rows are awaited, where none are.
        unasked: str = route if self._prefiller is None or self._can_prefill else Reason.PREFILL_LOST
        if prefiller is not None:
            await self._pair(state, prefiller)
        told = Told()
        lost = outcome.num_peers_lost
        began = time.monotonic()
        async with aclosing(answer(state.peer, ask, prefiller, told)) as messages:
            async for message in messages:
                verdict, reason = (message.verdict, message.reason) if not lost else ("partial", "peer_lost")
                if prefiller is None and not lost:
                    reason = unasked
                for offset, token in enumerate(message.token_ids):
                    yield Piece(message.index + offset, token, route, verdict, reason)
        self._learn(ask, told, state, route, outcome, began)
        if prefiller is None and not lost:
            outcome.reason = unasked

    async def _at_prefill_node(self, ask: Ask, outcome: Outcome) -> AsyncGenerator[Piece]:
        assert self._prefiller is not None
        verdict = "partial" if outcome.num_peers_lost else "local"
        reason = "peer_lost" if outcome.num_peers_lost else "prefill_node"
        outcome.verdict, outcome.reason = verdict, reason
        index = len(ask.resume)
        generated = self._prefiller.generate(
            [*ask.prompt, *ask.resume], ask.max_tokens - index, temperature=ask.temperature, top_p=ask.top_p,
            seed=ask.seed, stop_ids=ask.stop_ids,
        )  # fmt: skip
        first_at = 0.0
        async for token, _ in generated:
            first_at = first_at or time.monotonic()
            yield Piece(index, token, "prefill_node", verdict, reason)
            index += 1
        self.prefill_side_decode_rate.observe(index - len(ask.resume) - 1, time.monotonic() - first_at)
        outcome.finish_reason = "length" if index >= ask.max_tokens else "stop"

    async def _pair(self, state: _PeerState, prefiller: Prefiller) -> None:
        async with state.pairing:
            if not state.is_paired:
                await pair(state.peer, prefiller)
                state.is_paired = True

    def _learn(self, ask: Ask, told: Told, state: _PeerState, route: RouteName, outcome: Outcome, began: float) -> None:
        done = told.done
        assert done is not None
        if done.reason == Reason.NOT_PAIRED:
            # The peer was started anew; the next request pairs again.
            state.is_paired = False
        outcome.finish_reason = done.finish_reason
        outcome.rows_received += done.rows_received
        outcome.rows_cached = done.rows_cached
        outcome.kv_bytes += done.kv_bytes
        if not outcome.num_peers_lost:
            outcome.verdict, outcome.reason = done.verdict, done.reason
        times = done.times
        if "first_token" in times:
            self.decode_rate.observe(len(told.tokens) - 1, times["finished"] - times["first_token"])
            new = len(ask.prompt) - done.rows_cached
            if done.verdict == "local" and route == "decode_node":
                self.own_prefill_rate.observe(new, times["first_logits"])
            elif done.verdict == "full":
                self.prefill_rate.observe(new, told.prefill_ended_at - times["started_at"])
        if ask.conversation:
            num_tokens = len(ask.prompt) + len(ask.resume) + len(told.tokens)
            self._conversations.pop(ask.conversation, None)
            self._conversations[ask.conversation] = _Conversation(state, route, num_tokens)
            while len(self._conversations) > _MAX_CONVERSATIONS:
                self._conversations.popitem(last=False)
