"""What is recorded of one token, and what a detector may say about it.

A recorded token is a row of `NUM_FIELDS` float32 numbers, in the order of `TOKEN_FIELDS`. The same order stands
in the detector's output, in the shared memory that leaves the engine, and in a stored trace.

| field | unit | meaning |
|---|---|---|
| entropy | bits | Shannon entropy of the distribution the token was drawn from, before temperature |
| confidence | 0..1 | 1 - min(entropy / log2(vocabulary), 1) |
| max_prob | 0..1 | probability of the likeliest token |
| z | - | entropy in standard deviations above what was expected |
| hedge_statistic | - | statistic that is held against the HEDGE threshold, before any reset |
| refuse_statistic | - | statistic that is held against the REFUSE threshold, before any reset |
| action | `Action` | what the detector said at this token |
| boosted | 0 or 1 | whether the chain-of-thought boost was added to this token's logits |

An entropy of NaN marks a token whose logits held no distribution (all of them -inf, or a NaN among them).
"""

from __future__ import annotations

from enum import IntEnum

TOKEN_FIELDS = (
    "entropy",
    "confidence",
    "max_prob",
    "z",
    "hedge_statistic",
    "refuse_statistic",
    "action",
    "boosted",
)
NUM_FIELDS = len(TOKEN_FIELDS)
COLUMN = {name: column for column, name in enumerate(TOKEN_FIELDS)}


class Action(IntEnum):
    """A detector's verdict at one token; stored as a float in the column `action`."""

    GENERATE = 0
    HEDGE = 1
    REFUSE = 2
