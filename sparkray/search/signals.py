"""What is known of one token of a path.

A token is a row of float32 numbers in the order of `SIGNALS`. The first six come from watching the model (METIS),
the last two from the log-probabilities that the engine returns. NaN marks a signal that was not recorded.

| signal | unit | meaning |
|---|---|---|
| entropy | bits | of the distribution the token was drawn from, before temperature |
| confidence | 0..1 | 1 - entropy / log2(vocabulary) |
| max_prob | 0..1 | probability of the likeliest token |
| z | - | entropy in standard deviations above what was expected |
| hedge_statistic | - | CUSUM statistic of the detector that watched |
| action | 0, 1, 2 | what that detector said: generate, hedge, refuse |
| logprob | nats | log-probability of the token that was drawn |
| top_confidence | nats | minus the mean log-probability of the likeliest tokens (DeepConf, arXiv 2508.15260) |
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SIGNALS = ("entropy", "confidence", "max_prob", "z", "hedge_statistic", "action", "logprob", "top_confidence")
NUM_SIGNALS = len(SIGNALS)
COLUMN = {name: column for column, name in enumerate(SIGNALS)}
WATCHED = SIGNALS[:6]

FloatArray = NDArray[np.float32]
"""Rows of tokens, float32, shape [num_tokens, NUM_SIGNALS]."""


def empty_signals(num_tokens: int) -> FloatArray:
    """Rows in which nothing is known yet."""
    return np.full((num_tokens, NUM_SIGNALS), np.nan, dtype=np.float32)


def signals_from_watching(tokens_TF: FloatArray, fields: Sequence[str]) -> FloatArray:
    """Rows of `SIGNALS` out of the rows that METIS recorded, whose columns are named by `fields`."""
    signals = empty_signals(len(tokens_TF))
    for name in WATCHED:
        signals[:, COLUMN[name]] = tokens_TF[:, list(fields).index(name)]
    return signals


def top_confidence(logprobs: Sequence[float]) -> float:
    """DeepConf's confidence of one token: minus the mean of the log-probabilities of the likeliest tokens, in nats."""
    return -sum(logprobs) / len(logprobs)
