"""A decode engine in ten lines of arithmetic, for tests of what goes on around an engine.

Row of token t at position p in layer l: keys and values from a table, drawn once; the logits weigh every row by its
position, so that a row that is missing, shifted, doubled or of another model changes the next token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np

from sparkray.config.handoff import DecodeConfig, LinkConfig
from sparkray.errors import SparkrayError
from sparkray.handoff.client import Peer
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.fingerprint import ModelIdentity, prompt_hash
from sparkray.handoff.handing import FirstToken, PrefillOrder
from sparkray.handoff.messages import Generate, Hello
from sparkray.handoff.rows import KvRows
from sparkray.handoff.sender import RowSender, RowSlice, SendReport

LAYERS, HEADS, WIDTH, VOCABULARY = 3, 2, 4, 97
SECRET = b"a secret for tests"


def identity(**changes: Any) -> ModelIdentity:
    values: dict[str, Any] = {
        "architecture": "llama", "num_layers": LAYERS, "num_kv_heads": HEADS, "key_dim": WIDTH, "value_dim": WIDTH,
        "frequencies": (1.0, 0.01), "tokenizer": "t", "lineage": "l", "weights": "float32", "engine": "toy",
    }  # fmt: skip
    return ModelIdentity(**{**values, **changes})


class ToyEngine:
    def __init__(self, config: DecodeConfig, *, seed: int = 0, step_seconds: float = 0.0, **changes: Any) -> None:
        draw = np.random.default_rng(seed)
        self.keys = draw.standard_normal((LAYERS, VOCABULARY, HEADS, WIDTH)).astype(np.float32)
        self.values = draw.standard_normal((LAYERS, VOCABULARY, HEADS, WIDTH)).astype(np.float32)
        self.head = draw.standard_normal((VOCABULARY, 2 * LAYERS * HEADS * WIDTH)).astype(np.float32)
        self.identity = identity(**changes)
        self.context_tokens = config.context_tokens
        self.step_seconds = step_seconds
        self.num_computed = 0
        self.num_open = 0

    def rows(self, tokens: list[int], start: int) -> KvRows:
        turn = np.cos(np.arange(start, start + len(tokens), dtype=np.float32))[:, None, None]
        return KvRows(
            start,
            "float32",
            tuple(np.ascontiguousarray(table[tokens] * turn) for table in self.keys),
            tuple(np.ascontiguousarray(table[tokens] - turn) for table in self.values),
        )

    def open_sequence(self) -> ToySequence:
        self.num_open += 1
        return ToySequence(self)

    def close(self) -> None: ...


class ToySequence:
    def __init__(self, engine: ToyEngine) -> None:
        self._engine = engine
        self._parts: list[KvRows] = []

    @property
    def num_rows(self) -> int:
        return sum(part.count for part in self._parts)

    def import_rows(self, rows: KvRows) -> None:
        assert rows.start == self.num_rows
        self._parts.append(rows)

    def forward(self, token_ids: list[int]) -> Any:
        time.sleep(self._engine.step_seconds)
        self._engine.num_computed += len(token_ids)
        self._parts.append(self._engine.rows(token_ids, self.num_rows))
        held = self.export_rows(0, self.num_rows)
        weights = np.sin(1.0 + np.arange(held.count, dtype=np.float32))[:, None, None]
        features = [(array * weights).sum(axis=0).ravel() for array in (*held.keys_L, *held.values_L)]
        return (self._engine.head @ np.concatenate(features)).astype(np.float32)

    def export_rows(self, start: int, stop: int) -> KvRows:
        layers = range(LAYERS)
        return KvRows(
            start,
            "float32",
            tuple(np.concatenate([part.keys_L[layer] for part in self._parts])[start:stop] for layer in layers),
            tuple(np.concatenate([part.values_L[layer] for part in self._parts])[start:stop] for layer in layers),
        )

    def truncate(self, num_rows: int) -> None:
        if self._parts:
            self._parts = [self.export_rows(0, num_rows)]

    def close(self) -> None:
        self._engine.num_open -= 1


def monolithic(prompt: list[int], num_tokens: int) -> list[int]:
    """What one engine alone writes."""
    sequence = ToyEngine(DecodeConfig()).open_sequence()
    logits, answer = sequence.forward(prompt), []
    for _ in range(num_tokens):
        answer.append(int(logits.argmax()))
        logits = sequence.forward(answer[-1:])
    return answer


class ToyFeed:
    """Rows of a prompt, layer by layer within chunks; `before` is called with each slice's number."""

    def __init__(
        self, prompt: list[int], *, start: int = 0, chunk: int = 5, before: Callable[[int], None] = lambda index: None,
        change: Callable[[KvRows], KvRows] = lambda rows: rows,
    ) -> None:  # fmt: skip
        last = len(prompt) - 1
        self._rows = change(ToyEngine(DecodeConfig()).rows(prompt[:-1], 0))
        self._slices = [
            RowSlice(layer, first, min(chunk, last - first))
            for first in range(start, last, chunk)
            for layer in range(LAYERS)
        ]
        self._before = before

    def slice(self, index: int, timeout_seconds: float) -> RowSlice | None:
        if index >= len(self._slices):
            return None
        self._before(index)
        return self._slices[index]

    def read(self, piece: RowSlice) -> tuple[Any, Any]:
        rows = slice(piece.start, piece.start + piece.count)
        return self._rows.keys_L[piece.layer][rows], self._rows.values_L[piece.layer][rows]


class LostFeed(ToyFeed):
    """Ends at a slice as a prefill side ends that is killed: its last word is ABORT."""

    def __init__(self, prompt: list[int], at: int, **options: Any) -> None:
        super().__init__(prompt, **options)
        self._at = at

    def slice(self, index: int, timeout_seconds: float) -> RowSlice | None:
        if index >= self._at:
            raise ProtocolError(Reason.CANCELLED, "the prefill side was killed.")
        return super().slice(index, timeout_seconds)


QUICK = LinkConfig(
    stall_timeout_seconds=5, connect_timeout_seconds=5, total_timeout_seconds=30, retry_delay_seconds=0.01
)


def hello_for(request: Generate, start: int, **changes: Any) -> Hello:
    prefill = identity(**changes.pop("identity", {}))
    geometry = {
        "num_layers": LAYERS, "num_kv_heads": HEADS, "key_dim": WIDTH, "value_dim": WIDTH, "dtype": "float32",
    }  # fmt: skip
    values = {
        "request": request.request, "ticket": request.ticket, "fingerprint": prefill.digest,
        "identity": prefill.to_wire(), "geometry": geometry, "prompt_hash": prompt_hash(request.prompt),
        "prompt_tokens": len(request.prompt), "start": start, "codecs": ("raw",), "purpose": request.purpose,
    }  # fmt: skip
    return Hello(**{**values, **changes})


def send_rows(peer: Peer, request: Generate, feed: ToyFeed, start: int = 0, **changes: Any) -> SendReport:
    return RowSender(peer.connect, hello_for(request, start, **changes), feed, peer.link).run()


class ToyPrefiller:
    """A prefill side without an engine: rows of the toy, sent as vLLM's connector sends them.

    Args:
        before: called with a slice's number before it may leave; raises to die there.
    """

    def __init__(self, *, chunk: int = 5, before: Callable[[int], None] = lambda index: None, **changes: Any) -> None:
        self.identity = identity(**changes)
        self.vocabulary = VOCABULARY
        self._chunk = chunk
        self._before = before
        self.reports: list[SendReport] = []
        self.orders: list[PrefillOrder] = []
        self.is_alive = True

    async def prefill(self, prompt: list[int], order: PrefillOrder, timeout_seconds: float) -> FirstToken:
        self.orders.append(order)
        await asyncio.to_thread(self._send, prompt, order)
        logits = ToyEngine(DecodeConfig()).open_sequence().forward(prompt)
        return FirstToken((int(logits.argmax()),), (-0.01,))

    async def generate(self, prompt: list[int], max_tokens: int, **_: Any) -> AsyncIterator[tuple[int, float]]:
        for token in monolithic(prompt, max_tokens):
            await asyncio.sleep(0)
            yield token, 1.0

    def _send(self, prompt: list[int], order: PrefillOrder) -> None:
        request = Generate(order.request, order.ticket, tuple(prompt), 1, purpose=order.purpose)  # type: ignore[arg-type]
        feed = ToyFeed(prompt, start=order.start, chunk=self._chunk, before=self._before)
        changes: dict[str, Any] = {"identity": {"lineage": self.identity.lineage}}
        try:
            peer = Peer(order.address, SECRET, link=QUICK)
            self.reports.append(send_rows(peer, request, feed, order.start, **changes))
        except SparkrayError:
            return
