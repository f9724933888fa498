"""Rotary frequencies as a configuration states them, so that two engines' readings of it can be compared.

A wrong base or a scaling that one side ignores gives fluent, wrong text; the array of frequencies shows it at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sparkray.handoff.errors import ProtocolError, Reason

Frequencies = npt.NDArray[np.float64]


def inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> Frequencies:
    """Angular frequency of each rotary pair, (rotary width / 2), in float64.

    Args:
        config: a `config.json` of transformers, of either form: `rope_parameters`, or `rope_theta` with `rope_scaling`.
        head_dim: width of a head.

    Raises:
        ProtocolError: no base is stated, two that differ, or a scaling that is not known here.
    """
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    stated = {float(base) for base in (scaling.get("rope_theta"), config.get("rope_theta")) if base is not None}
    if len(stated) != 1:
        raise ProtocolError(
            Reason.FINGERPRINT,
            f"the configuration states {sorted(stated) or 'no'} rotary bases, and exactly one is expected.",
            hint="Write rope_theta, and the same value in rope_parameters: readers differ in which one they use.",
        )
    width = int(head_dim * float(scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0))
    plain = stated.pop() ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return np.asarray(plain)
    if kind == "linear":
        return np.asarray(plain / float(scaling["factor"]))
    if kind == "llama3":
        return _llama3(plain, scaling)
    raise ProtocolError(Reason.UNSUPPORTED, f"rotary scaling {kind!r} is not supported; default, linear, llama3 are.")


def frequencies_digest(frequencies: Frequencies) -> tuple[float, ...]:
    """The frequencies rounded to six digits: engines compute them in float32."""
    return tuple(float(f"{frequency:.5e}") for frequency in frequencies)


def _llama3(plain: Frequencies, scaling: Mapping[str, Any]) -> Frequencies:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    factor, old_context = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    waves = 2 * math.pi / plain
    kept_share = np.clip((old_context / waves - low) / (high - low), 0.0, 1.0)
    return np.asarray((1 - kept_share) * plain / factor + kept_share * plain)
