"""One answer on the decode side: rows from the wire or computed here, then token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparkray.handoff.canary import check_first_token
from sparkray.handoff.compare import top2_margin
from sparkray.handoff.errors import ProtocolError
from sparkray.handoff.messages import Done, Generate, Tokens
from sparkray.handoff.pool import HeldSequence
from sparkray.handoff.rows import Floats
from sparkray.handoff.transfer import Transfer

# Runs a function on the engine's thread and gives its result.
OnEngine = Callable[..., Any]
# Tokens of one computation of the prompt: between two of them, other requests take their steps.
_PREFILL_TOKENS = 256


@dataclass(slots=True)
class _Counts:
    received: int = 0
    computed: int = 0


class Generation:
    """Runs one GENERATE to its end.

    Args:
        request: what was asked for.
        held: the sequence, with the rows that are here already.
        transfer: where rows come in; None: all are computed here.
        on_engine: runs a function on the engine's thread.
        send: gives tokens to the client; raises where it is gone.
        listen: hears the client for so many seconds at most; raises where it is gone.
    """

    def __init__(
        self,
        request: Generate,
        held: HeldSequence,
        transfer: Transfer | None,
        on_engine: OnEngine,
        send: Callable[[Tokens], None],
        listen: Callable[[float], None],
    ) -> None:
        self._listen = listen
        self._request = request
        self._held = held
        self._transfer = transfer
        self._on_engine = on_engine
        self._send = send
        self._cached = len(held.token_ids)
        self._started = time.time()
        self._times: dict[str, float] = {"started_at": self._started}
        self._counts = _Counts()
        self._reason = ""
        self._verdict = ""

    def run(self) -> Done:
        """Answer; gives the closing message."""
        if self._transfer is not None:
            self._await_rows(self._transfer)
        logits_V = self._first_logits()
        self._times["first_logits"] = self._elapsed()
        self._judge()
        finish_reason = self._write(logits_V)
        self._times["finished"] = self._elapsed()
        return Done(
            finish_reason=finish_reason,
            verdict=self._verdict,
            reason=self._reason,
            rows_received=self._counts.received,
            rows_cached=self._cached,
            rows_computed=self._counts.computed,
            kv_bytes=self._transfer.received_bytes if self._transfer else 0,
            times=self._times,
        )

    def _judge(self) -> None:
        """Say how the prompt's rows came."""
        received, wanted = self._counts.received, len(self._request.prompt) - 1 - self._cached
        if self._transfer is None:
            self._verdict = "local"
        elif received == wanted:
            self._verdict, self._reason = "full", ""
        else:
            self._verdict = "partial" if received else "local"

    def _await_rows(self, transfer: Transfer) -> None:
        complete = transfer.wait_for_rows(self._request.rows_timeout_seconds, self._listen)
        # Imports that were under way end before this one, on the same thread.
        here = self._on_engine(lambda: self._held.sequence.num_rows)
        del self._held.token_ids[self._cached :]
        self._held.token_ids += self._request.prompt[self._cached : here]
        self._counts.received = here - self._cached
        self._reason = "" if complete else transfer.last_reason
        self._times["rows_here"] = self._elapsed()
        if complete:
            self._times["rows_complete_at"] = transfer.complete_at

    def _first_logits(self) -> Floats:
        """Logits of the answer's next token; checked against the prefill side's where it tells them."""
        logits_V = self._compute(list(self._request.prompt))
        transfer = self._transfer
        if transfer is not None and self._request.confirm and self._counts.received:
            confirm = transfer.wait_for_confirm(self._request.rows_timeout_seconds, self._listen)
            try:
                if confirm is not None:
                    check_first_token(logits_V, confirm.token_ids, confirm.logprobs)
            except ProtocolError as failure:
                # Rows that cannot be trusted are not used at all, those that were cached before them included.
                self._reason = failure.reason
                self._counts.received = self._cached = 0
                self._on_engine(self._held.sequence.truncate, 0)
                self._held.token_ids.clear()
                logits_V = self._compute(list(self._request.prompt))
        if self._request.resume:
            logits_V = self._compute([*self._request.prompt, *self._request.resume])
        return logits_V

    def _compute(self, token_ids: list[int]) -> Floats:
        """Compute the rows that are missing; logits after the last token."""
        missing = token_ids[len(self._held.token_ids) :]
        for begin in range(0, len(missing), _PREFILL_TOKENS):
            some = missing[begin : begin + _PREFILL_TOKENS]
            logits_V = self._on_engine(self._held.sequence.forward, some)
            self._held.token_ids += some
        self._counts.computed += len(missing)
        return np.asarray(logits_V)

    def _write(self, logits_V: Floats) -> str:
        request = self._request
        index = len(request.resume)
        while index < request.max_tokens:
            token = choose_token(logits_V, request, index)
            if token in request.stop_ids:
                return "stop"
            if index == len(request.resume):
                self._times["first_token"] = self._elapsed()
            self._send(Tokens(index, (token,), (top2_margin(logits_V),), self._verdict, self._reason))
            index += 1
            if index < request.max_tokens:
                logits_V = self._on_engine(self._held.sequence.forward, [token])
                self._held.token_ids.append(token)
        return "length"

    def _elapsed(self) -> float:
        return time.time() - self._started


def choose_token(logits_V: Floats, request: Generate, index: int) -> int:
    """The answer's token at `index`: the likeliest, or drawn.

    The generator is seeded with the request's seed and the index alone, so that another peer that goes on from there
    draws the same.
    """
    if request.temperature == 0:
        return int(logits_V.argmax())
    scaled = (logits_V.astype(np.float64) - logits_V.max()) / request.temperature
    shares = np.exp(scaled)
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    before = np.cumsum(shares[order]) - shares[order]
    kept = order[before < request.top_p]
    weights = shares[kept] / shares[kept].sum()
    return int(np.random.default_rng([request.seed, index]).choice(kept, p=weights))
