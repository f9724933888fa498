"""The errors of training.

InternalError
└── WeightSyncError      the engine does not compute what the trainer does: a push did not arrive
UnavailableError
└── StaleEngineError     an engine does not hold the weights that are asked for; push to it first
"""

from __future__ import annotations

from sparkray.errors import InternalError, UnavailableError


class WeightSyncError(InternalError):
    """The canary found that engine and trainer do not have the same weights."""


class StaleEngineError(UnavailableError):
    """An engine was asked to draw with weights that it does not hold, as after a restart."""
