"""Fitting a reference profile on recorded entropies, and counting the false alarms that it leads to.

The thresholds come from simulation: the stationary bootstrap (Politis and Romano, 1994) strings blocks of the recorded
streams together into long ones, and the average run length (ARL) of a threshold is the number of tokens run through
per alarm of a CUSUM statistic (Page, 1954) that starts anew after each. The blocks are long, because answers differ
from one another: what makes one of them uncertain throughout has to be in the simulation too.

A threshold for an ARL far above the number of recorded tokens rests on the simulation alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import InputError
from sparkray.metis.profile import ReferenceProfile, Stream, model_slug

# Drifts taken off every z. A CUSUM is best at shifts of twice its drift.
HEDGE_DRIFT = 0.25
REFUSE_DRIFT = 0.75

_ARL_GRID = (50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0, 20_000.0, 50_000.0)
# Thresholds that are tried, in units of z: a finer grid moves what is interpolated by less than the simulation does.
_LOWEST_THRESHOLD = 0.1
_NUM_CANDIDATES = 48
_MIN_TOKENS = 500
_MAX_LAG1 = 0.95


def fit_profile(
    entropy_streams: Sequence[Sequence[float] | Stream],
    *,
    model: str,
    temperature: float,
    task: str = "chat",
    seed: int = 0,
    mean_block_tokens: int = 128,
) -> ReferenceProfile:
    """Fit a profile on recorded entropies.

    Args:
        entropy_streams: one sequence of entropies in bits for each answer, in the order of its tokens.
        model: name, hub id or folder of the model.
        temperature, task: of the recording.
        seed: of the simulation; the same streams and seed give the same profile.
        mean_block_tokens: mean length of the blocks of the bootstrap. Long enough to keep how entropies hang
            together, short against the recording.

    Raises:
        InputError: fewer than 500 tokens, a value that is not a finite number of bits >= 0, or no variation at all.
    """
    streams = [np.asarray(stream, dtype=np.float64) for stream in entropy_streams]
    streams = [stream for stream in streams if len(stream)]
    num_tokens = sum(len(stream) for stream in streams)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"a temperature of at least 0 is expected, and {temperature} was given.", param="temperature")
    if num_tokens < _MIN_TOKENS:
        raise InputError(f"a profile needs at least {_MIN_TOKENS} recorded tokens, and {num_tokens} were given.")
    pooled = np.concatenate(streams)
    if not (np.isfinite(pooled).all() and (pooled >= 0).all()):
        raise InputError("the recorded entropies hold values that are not finite numbers of bits >= 0.")
    mean, std = float(pooled.mean()), float(pooled.std())
    if std < 1e-3:
        raise InputError(f"the recorded entropies do not vary (standard deviation {std:.2g} bits).")
    bare = ReferenceProfile(
        model=model_slug(model),
        temperature=float(temperature),
        task=task,
        mean_bits=mean,
        std_bits=std,
        lag1=_lag1(streams, mean, std),
        hedge_drift=HEDGE_DRIFT,
        refuse_drift=REFUSE_DRIFT,
        table=(),
        num_streams=len(streams),
        num_tokens=num_tokens,
        seed=seed,
    )
    z_streams = [bare.z_scores(stream) for stream in streams]
    simulated = _bootstrap(z_streams, np.random.default_rng(seed), mean_block_tokens)
    table = zip(
        _ARL_GRID,
        _thresholds(simulated, HEDGE_DRIFT),
        _thresholds(simulated, REFUSE_DRIFT),
        strict=True,
    )
    return replace(bare, table=tuple(table))


@dataclass(frozen=True, slots=True)
class AlarmCount:
    """Alarms of the two statistics on streams, each restarted after its own alarm and at every stream."""

    num_tokens: int
    num_hedge: int
    num_refuse: int


def count_alarms(
    profile: ReferenceProfile, entropy_streams: Sequence[Sequence[float] | Stream], arl_tokens: float
) -> AlarmCount:
    """What the thresholds for `arl_tokens` lead to on streams that the profile was not fitted on."""
    hedge, refuse = profile.thresholds(arl_tokens)
    streams = [np.asarray(stream, dtype=np.float64) for stream in entropy_streams]
    scores = [profile.z_scores(stream) for stream in streams if len(stream)]
    return AlarmCount(
        num_tokens=sum(len(z) for z in scores),
        num_hedge=sum(_num_alarms(z, profile.hedge_drift, hedge) for z in scores),
        num_refuse=sum(_num_alarms(z, profile.refuse_drift, refuse) for z in scores),
    )


def cross_check(
    entropy_streams: Sequence[Sequence[float] | Stream],
    *,
    share: float,
    temperature: float,
    seed: int = 0,
    arls_tokens: Sequence[float] = (200.0, 1_000.0, 5_000.0),
) -> dict[float, AlarmCount]:
    """Alarms on a random `share` of the answers under a profile fitted on the others, for each wanted ARL.

    Raises:
        InputError: the share leaves no answer on one of the sides, or too few tokens to fit.
    """
    order = np.random.default_rng(seed).permutation(len(entropy_streams))
    num_held = round(share * len(order))
    if not 0 < num_held < len(order):
        raise InputError(f"a share of {share:g} of {len(order)} answers leaves one side empty.", param="hold_out")
    held, rest = ([entropy_streams[at] for at in part] for part in (order[:num_held], order[num_held:]))
    profile = fit_profile(rest, model="held-out", temperature=temperature, seed=seed)
    return {arl_tokens: count_alarms(profile, held, arl_tokens) for arl_tokens in arls_tokens}


def _num_alarms(z_scores: Stream, drift: float, threshold: float) -> int:
    statistic, num_alarms = 0.0, 0
    for z in z_scores.tolist():
        statistic = max(0.0, statistic + z - drift)
        if statistic >= threshold:
            statistic, num_alarms = 0.0, num_alarms + 1
    return num_alarms


def _lag1(streams: Sequence[Stream], mean: float, std: float) -> float:
    products = np.concatenate([(stream[1:] - mean) * (stream[:-1] - mean) for stream in streams])
    if not len(products):
        return 0.0
    return float(np.clip(products.mean() / std**2, -_MAX_LAG1, _MAX_LAG1))


def _bootstrap(
    streams: Sequence[Stream],
    generator: np.random.Generator,
    mean_block_tokens: int,
    num_paths: int = 800,
    num_steps: int = 5_000,
) -> NDArray[np.float32]:
    """Long streams [path, step] of random blocks; a block ends by chance or with the stream it was cut from."""
    pooled = np.concatenate(streams)
    is_last = np.zeros(len(pooled), dtype=bool)
    is_last[np.cumsum([len(stream) for stream in streams]) - 1] = True
    simulated = np.empty((num_paths, num_steps), dtype=np.float32)
    position = generator.integers(len(pooled), size=num_paths)
    for step in range(num_steps):
        simulated[:, step] = pooled[position]
        jumps = is_last[position] | (generator.random(num_paths) < 1.0 / mean_block_tokens)
        position = np.where(jumps, generator.integers(len(pooled), size=num_paths), position + 1)
    return simulated


def _thresholds(simulated: NDArray[np.float32], drift: float) -> list[float]:
    """The threshold for every ARL of the grid: tokens per alarm, the statistic starting anew after each.

    Counted over all alarms and not up to the first: what raised one alarm often lasts and raises the next.
    """
    walk = np.cumsum(simulated - drift, axis=1, dtype=np.float64)
    highest = float((walk - np.minimum(np.minimum.accumulate(walk, axis=1), 0.0)).max())
    candidates_H = np.geomspace(_LOWEST_THRESHOLD, highest, _NUM_CANDIDATES)
    statistic_PH = np.zeros((len(simulated), _NUM_CANDIDATES), dtype=np.float32)
    limits_H = candidates_H.astype(np.float32)
    alarmed_PH = np.empty(statistic_PH.shape, dtype=bool)
    num_alarms_PH = np.zeros(statistic_PH.shape, dtype=np.int16)
    for step_P in np.ascontiguousarray(simulated.T) - np.float32(drift):
        statistic_PH += step_P[:, None]
        np.maximum(statistic_PH, 0.0, out=statistic_PH)
        np.greater_equal(statistic_PH, limits_H, out=alarmed_PH)
        num_alarms_PH += alarmed_PH
        np.copyto(statistic_PH, 0.0, where=alarmed_PH)
    num_alarms_H = num_alarms_PH.sum(axis=0, dtype=np.int64)
    known = num_alarms_H > 0
    # A higher threshold alarms less often; the simulation's own scatter must not say otherwise.
    run_length_H = np.maximum.accumulate(simulated.size / num_alarms_H[known])
    found = np.interp(np.log(_ARL_GRID), np.log(run_length_H), candidates_H[known])
    return [float(threshold) for threshold in found]
