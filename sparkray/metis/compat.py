"""METIS's own names for its vLLM processors, over this package's detector and boost.

    composite = MetisCompositeProcessor(tokenizer)
    watch = composite.for_request("question-17")           # one request, by a name of its own
    logits = watch(token_ids, logits)                      # for every token, before it is drawn
    composite.get_traces_summary()

These are callables `(token_ids, logits [V]) -> logits [V]` for engines that take one per request: vLLM through its
adapter for per-request processors, or a loop of your own. Inside this project's engine `MetisLogitsProcessor` watches
whole batches instead.

METIS knows a request by `id(token_ids)`, which Python gives to another list once the first is gone. Here a request is
a name (`for_request`) or, where a processor is called directly, the list object itself, kept alive with its state and
expected to grow. A call with as many tokens as the one before replaces it (an engine asked twice for one token); a
call with fewer begins a new request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparkray.metis.boost import BoostTable, Tokenizer, apply_boost
from sparkray.metis.detectors import DetectorBank
from sparkray.metis.entropy import entropy_stats
from sparkray.metis.fields import COLUMN, NUM_FIELDS, Action
from sparkray.metis.options import DEFAULT_BONUS, WatchOptions
from sparkray.metis.trace import CognitiveTrace

FloatArray = NDArray[np.float32]
Watcher = Callable[[Sequence[int], Tensor], Tensor]

# Of more requests than this the first are forgotten.
MAX_REQUESTS = 4096


@dataclass(eq=False)
class _Request:
    """One request: its detector, a bank of one row, and what was recorded of it."""

    number: int
    seq_id: Hashable
    token_ids: Sequence[int]
    bank: DetectorBank
    before: Tensor
    num_seen: int = -1
    tokens: list[Tensor] = field(default_factory=list)

    def all_tokens(self) -> FloatArray:
        if not self.tokens:
            return np.empty((0, NUM_FIELDS), dtype=np.float32)
        array: FloatArray = torch.cat(self.tokens).cpu().numpy()
        return array


class MetisCUSUMProcessor:
    """Observes the entropy of every token and runs the CUSUM; the logits pass unchanged.

    Args:
        config: thresholds; METIS's own where None.
    """

    def __init__(self, config: WatchOptions | None = None) -> None:
        config = config if config is not None else WatchOptions()
        bonus = config.boost_bonus or DEFAULT_BONUS["published"]
        # The 50 tokens after an alarm are counted in any case; it is `CoTBoostProcessor` that acts on them.
        self._options = replace(config, boost="published", boost_bonus=bonus)
        self._requests: OrderedDict[Hashable, _Request] = OrderedDict()
        self._num_begun = 0

    def __call__(self, token_ids: Sequence[int], logits: Tensor) -> Tensor:
        self.observe(None, token_ids, logits)
        return logits

    def for_request(self, key: Hashable) -> Watcher:
        """This processor for the request called `key`."""

        def watch(token_ids: Sequence[int], logits: Tensor) -> Tensor:
            self.observe(key, token_ids, logits)
            return logits

        return watch

    def observe(self, key: Hashable, token_ids: Sequence[int], logits: Tensor) -> None:
        """Take in one token of the request called `key`; None means the list itself."""
        request = self._request(key, token_ids, logits.device)
        if len(token_ids) == request.num_seen:
            request.bank.restore(0, request.before)
            request.tokens.pop()
        request.before, request.num_seen = request.bank.save(0), len(token_ids)
        row_B = torch.zeros(1, dtype=torch.int64, device=logits.device)
        request.tokens.append(request.bank.observe(row_B, entropy_stats(logits.unsqueeze(0)), len(logits)))

    def bonus(self, key: Hashable, token_ids: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """(mode_B, bonus_B) of the request's last token, B = 1; None for a request that was not observed."""
        request = self._requests.get(_place(key, token_ids))
        if request is None:
            return None
        tokens_BF = request.tokens[-1]
        return request.bank.boost_bonus(torch.zeros(1, dtype=torch.int64, device=tokens_BF.device), tokens_BF)

    def get_traces(self) -> list[CognitiveTrace]:
        """What was recorded, a request each, in the order in which they began."""
        return [
            CognitiveTrace.from_tokens(request.all_tokens(), request_id=str(request.seq_id))
            for request in self._in_order()
        ]

    def get_traces_summary(self) -> list[dict[str, Any]]:
        """METIS's summary of each request, in the order in which they began.

        The keys are seq_id, total_tokens, hedge_count, refuse_count, mean_entropy, peak_cusum and events; `seq_id` is
        the request's name, or the number in which an unnamed one began.
        """
        return [_summary(request) for request in self._in_order()]

    def reset(self) -> None:
        """Forget every request."""
        self._requests.clear()

    def _in_order(self) -> list[_Request]:
        return sorted(self._requests.values(), key=lambda request: request.number)

    def _request(self, key: Hashable, token_ids: Sequence[int], device: torch.device) -> _Request:
        place = _place(key, token_ids)
        known = self._requests.get(place)
        if known is not None and len(token_ids) >= known.num_seen:
            return known
        if known is not None:
            self._requests[("ended", known.number)] = self._requests.pop(place)
        bank = DetectorBank(1, device)
        bank.reset(0, self._options)
        number = self._num_begun
        self._num_begun += 1
        seq_id = number if key is None else key
        request = self._requests[place] = _Request(number, seq_id, token_ids, bank, bank.save(0))
        if len(self._requests) > MAX_REQUESTS:
            self._requests.popitem(last=False)
        return request


class CoTBoostProcessor:
    """Raises the logits of tokens with which a second thought begins, for 50 tokens after a HEDGE.

    Args:
        tokenizer: of the model.
        cusum_processor: whose alarms count; called before this one for every token.
    """

    def __init__(self, tokenizer: Tokenizer, cusum_processor: MetisCUSUMProcessor) -> None:
        self._cusum = cusum_processor
        self._tokenizer = tokenizer
        self._tables: dict[torch.device, BoostTable] = {}

    def __call__(self, token_ids: Sequence[int], logits: Tensor) -> Tensor:
        return self.boost(None, token_ids, logits)

    def for_request(self, key: Hashable) -> Watcher:
        """This processor for the request called `key`."""
        return lambda token_ids, logits: self.boost(key, token_ids, logits)

    def boost(self, key: Hashable, token_ids: Sequence[int], logits: Tensor) -> Tensor:
        """The logits with the request's bonus added, in place."""
        found = self._cusum.bonus(key, token_ids)
        if found is not None:
            apply_boost(logits.unsqueeze(0), None, *found, self._table(logits.device))
        return logits

    def _table(self, device: torch.device) -> BoostTable:
        if device not in self._tables:
            self._tables[device] = BoostTable(self._tokenizer, device)
        return self._tables[device]


class MetisCompositeProcessor:
    """Both: first observe, then boost.

    Args:
        tokenizer: of the model.
        config: thresholds; METIS's own where None.
    """

    def __init__(self, tokenizer: Tokenizer, config: WatchOptions | None = None) -> None:
        self._cusum = MetisCUSUMProcessor(config)
        self._boost = CoTBoostProcessor(tokenizer, self._cusum)

    def __call__(self, token_ids: Sequence[int], logits: Tensor) -> Tensor:
        return self._boost(token_ids, self._cusum(token_ids, logits))

    def for_request(self, key: Hashable) -> Watcher:
        """This processor for the request called `key`."""
        observe, boost = self._cusum.for_request(key), self._boost.for_request(key)
        return lambda token_ids, logits: boost(token_ids, observe(token_ids, logits))

    def get_cusum_processor(self) -> MetisCUSUMProcessor:
        """The observing half."""
        return self._cusum

    def get_traces(self) -> list[CognitiveTrace]:
        """As `MetisCUSUMProcessor.get_traces`."""
        return self._cusum.get_traces()

    def get_traces_summary(self) -> list[dict[str, Any]]:
        """As `MetisCUSUMProcessor.get_traces_summary`."""
        return self._cusum.get_traces_summary()

    def reset(self) -> None:
        """Forget every request."""
        self._cusum.reset()


def _place(key: Hashable, token_ids: Sequence[int]) -> Hashable:
    # The identity of a list is a sound key only because the list is held as long as its request is known.
    return ("list", id(token_ids)) if key is None else ("named", key)


def _summary(request: _Request) -> dict[str, Any]:
    tokens_TF = request.all_tokens()
    actions = [Action(int(action)) for action in tokens_TF[:, COLUMN["action"]]]
    events = [
        {
            "step": step,
            "entropy": _rounded(row[COLUMN["entropy"]]),
            "z_score": _rounded(row[COLUMN["z"]]),
            "confidence": _rounded(row[COLUMN["confidence"]]),
            "cusum": _rounded(row[COLUMN["hedge_statistic"]]),
            "action": action.name.lower(),
        }
        for step, (row, action) in enumerate(zip(tokens_TF.tolist(), actions, strict=True), start=1)
    ]
    return {
        "seq_id": request.seq_id,
        "total_tokens": len(tokens_TF),
        "hedge_count": actions.count(Action.HEDGE),
        "refuse_count": actions.count(Action.REFUSE),
        "mean_entropy": _rounded(float(np.nanmean(tokens_TF[:, COLUMN["entropy"]]))),
        "peak_cusum": _rounded(float(tokens_TF[:, COLUMN["hedge_statistic"]].max())),
        "events": events,
    }


def _rounded(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None
