"""One request handed off: the decode peer is asked, the prefill side reads the prompt and sends its rows, tokens come.

Also the pairing that comes before it. Everything that can fail here leaves the answer whole: the peer computes what
did not come, and another peer goes on where one ended (`coordinator.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from sparkray.errors import SparkrayError
from sparkray.handoff.canary import probe_tokens
from sparkray.handoff.client import Answer, Peer, request_name
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.fingerprint import ModelIdentity
from sparkray.handoff.messages import Done, Generate, Tokens

_logger = logging.getLogger(__name__)
# Of the longest silence: a peer whose rows stay away must have the rest to compute them before it is given up.
_ROWS_SHARE = 0.5
# Between two looks at whether the prefill side still lives.
_LOOK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What prefill says comes next: likeliest tokens with natural log probabilities, likeliest first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PrefillOrder:
    """Where the rows of a request go.

    Attributes:
        request: name of the request on the decode side.
        ticket: what the coordinator signed.
        address: HOST:PORT of the decode side.
        start: first row that it lacks.
        purpose: "serve" or "canary".
    """

    request: str
    ticket: str
    address: str
    start: int = 0
    purpose: str = "serve"


class Prefiller(Protocol):
    """The prefill side as a coordinator sees it."""

    identity: ModelIdentity
    vocabulary: int

    @property
    def is_alive(self) -> bool:
        """Whether it can still read prompts."""
        ...

    async def prefill(self, prompt: list[int], order: PrefillOrder, timeout_seconds: float) -> FirstToken:
        """Read the prompt and send its rows; returns when the engine has read it."""
        ...

    def generate(
        self, prompt: list[int], max_tokens: int, *, temperature: float = 0.0, top_p: float = 1.0,
        seed: int | None = None, stop_ids: tuple[int, ...] = (),
    ) -> AsyncIterator[tuple[int, float]]:  # fmt: skip
        """The whole answer by this engine alone: tokens, with the margin between the two likeliest."""
        ...


@dataclass(frozen=True, slots=True)
class Ask:
    """One request before it has a route.

    Attributes:
        prompt: token ids.
        max_tokens: of the answer.
        conversation: name under which rows are kept; empty: they are not.
        resume: tokens of the answer that are out already.
        timeout_seconds: longest silence, of rows and of tokens.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    conversation: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    resume: tuple[int, ...] = ()
    timeout_seconds: float = 60.0


@dataclass(slots=True)
class Told:
    """What is known of an answer while it comes.

    Attributes:
        tokens: so far.
        margins: between the two likeliest at each.
        done: the peer's closing message.
        prefill_ended_at: when the prefill engine had read the prompt, Unix seconds; 0: it did not.
    """

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    done: Done | None = None
    prefill_ended_at: float = 0.0


async def answer(
    peer: Peer, ask: Ask, prefiller: Prefiller | None, told: Told, *, purpose: str = "serve"
) -> AsyncGenerator[Tokens]:
    """Tokens of one peer, with rows from `prefiller`, or computed there where it is None.

    Raises:
        UnavailableError, PeerRefusedError, ProtocolError, WaitTimeoutError, OSError, EOFError: the peer ended before
            the answer did; `told` holds what came.
    """
    name = request_name()
    request = Generate(
        name, peer.ticket(name, ask.prompt), ask.prompt, ask.max_tokens, ask.resume,
        "local" if prefiller is None else "handoff", ask.conversation, ask.temperature, ask.top_p, ask.seed,
        ask.timeout_seconds * _ROWS_SHARE, prefiller is not None and purpose == "serve", ask.stop_ids,
        "canary" if purpose == "canary" else "serve",
    )  # fmt: skip
    # A thread of its own for each answer: it waits most of its life, and a shared pool would run out of threads.
    thread = ThreadPoolExecutor(1, thread_name_prefix="handoff-answer")
    loop = asyncio.get_running_loop()
    opened = await loop.run_in_executor(thread, Answer, peer, request)
    feeding: asyncio.Task[None] | None = None
    if prefiller is not None:
        order = PrefillOrder(name, request.ticket, peer.address, opened.status.cached_rows, purpose)
        feeding = asyncio.create_task(_feed(prefiller, ask, order, opened, told))
    messages = opened.tokens(ask.timeout_seconds)
    finished = False
    try:
        while (message := await loop.run_in_executor(thread, next, messages, None)) is not None:
            told.tokens += message.token_ids
            told.margins += message.margins
            yield message
        told.done = opened.done
        finished = True
    finally:
        if not finished:
            opened.cancel()
        thread.shutdown(wait=False)
        if feeding is not None:
            if not finished:
                feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


async def pair(peer: Peer, prefiller: Prefiller, timeout_seconds: float = 120.0) -> Done:
    """Run the canary; the peer takes rows of this model from now on.

    Raises:
        ProtocolError: the probe differs; the message has the numbers.
        PeerRefusedError: the peer has another model, or another secret.
    """
    told = Told()
    ask = Ask(tuple(probe_tokens(prefiller.vocabulary)), 1, timeout_seconds=timeout_seconds)
    async for _ in answer(peer, ask, prefiller, told, purpose="canary"):
        raise ProtocolError(Reason.ORDER, "a canary was answered with tokens.")
    assert told.done is not None
    if not told.done.report.get("passed"):
        found = {key: round(value, 6) for key, value in told.done.report.items() if isinstance(value, float)}
        raise ProtocolError(
            Reason.CANARY,
            f"the probe differs between the prefill side and {peer.address}: {found}.",
            hint="Compare weights, rotary base and cache types of both sides.",
        )
    return told.done


async def collect(stream: AsyncIterator[Tokens], told: Told, on_token: Callable[[int], None] | None = None) -> Told:
    """Read an answer to its end."""
    async for message in stream:
        for token in message.token_ids:
            if on_token is not None:
                on_token(token)
    return told


async def _feed(prefiller: Prefiller, ask: Ask, order: PrefillOrder, opened: Answer, told: Told) -> None:
    """Have the prompt read and tell the peer what comes next.

    A prefill side that ends before the answer begins is told too, be it while it reads or while its rows still leave:
    the peer computes what it lacks.
    """
    first = FirstToken((), ())
    try:
        first = await prefiller.prefill(list(ask.prompt), order, ask.timeout_seconds)
        told.prefill_ended_at = time.time()
    except (SparkrayError, TimeoutError) as failure:
        _logger.warning("a prefill failed; the decode side computes its rows: %s", failure)
    if order.purpose != "serve":
        return
    try:
        await asyncio.to_thread(opened.confirm, first.token_ids, first.logprobs)
        while first.token_ids and not told.tokens and told.done is None:
            if not prefiller.is_alive:
                _logger.warning("the prefill side ended before its rows had left; the decode side computes the others")
                await asyncio.to_thread(opened.confirm, (), ())
                return
            await asyncio.sleep(_LOOK_SECONDS)
    except OSError:
        _logger.info("the decode side was gone before its first token could be confirmed")
