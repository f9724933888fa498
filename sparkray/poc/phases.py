"""Phases that a controller sets and states that a node reports, with the network's values."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class Phase(IntEnum):
    """What the workers are told to do."""

    IDLE = 0
    GENERATE = 1
    VALIDATE = 2
    STOP = 3


class PowState(StrEnum):
    """What a node answers to a status request."""

    IDLE = "IDLE"
    NOT_LOADED = "NOT_LOADED"
    LOADING = "LOADING"
    GENERATING = "GENERATING"
    VALIDATING = "VALIDATING"
    STOPPED = "STOPPED"
    MIXED = "MIXED"


_STATE_OF_PHASE = {
    Phase.GENERATE: PowState.GENERATING,
    Phase.VALIDATE: PowState.VALIDATING,
    Phase.STOP: PowState.STOPPED,
}


def pow_state(phase: Phase | None, *, all_loaded: bool) -> PowState:
    """The state of a node in `phase` (None: nothing was initialised).

    LOADING shows in the idle phase alone, as on the network.
    """
    if phase is None:
        return PowState.NOT_LOADED
    if phase is Phase.IDLE:
        return PowState.IDLE if all_loaded else PowState.LOADING
    return _STATE_OF_PHASE[phase]
