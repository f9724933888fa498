"""The per-request switches, as they arrive in the flat `vllm_xargs` of an OpenAI request.

| key | type | meaning | default |
|---|---|---|---|
| metis | bool, 0/1, "on"/"off"/"true"/"false"/"1"/"0" | watch this request | on where another `metis_*` key is given |
| metis_detector | "metis", "calibrated" | which rule raises alarms | metis |
| metis_drift | number >= 0 | metis: z below this counts as ordinary | 0.5 |
| metis_hedge | number > 0 | metis: HEDGE at this statistic | 4 |
| metis_refuse | number > 0 | metis: REFUSE at this statistic | 8 |
| metis_decay | number in (0, 1] | metis: factor of the statistic on a confident token | 0.85 |
| metis_arl | number in [50, 50000] | calibrated: mean number of tokens between false alarms of each statistic | 5000 |
| metis_profile | text | calibrated: name of a stored reference profile | required |
| metis_boost | "off", "published", "careful" | chain-of-thought boost after a HEDGE | off |
| metis_boost_bonus | number in (0, 100] | what the boost adds to a logit | 5 published, 2 careful |
| metis_key | text, int | the client's own name for this request, copied into its trace | none |
| metis_slot, metis_generation | int >= 0 | place of the trace in shared memory; the engine sets them | none |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sparkray.config.metis import BoostName, DetectorName
from sparkray.errors import InputError

DETECTORS: tuple[DetectorName, ...] = ("metis", "calibrated")
BOOSTS: tuple[BoostName, ...] = ("off", "published", "careful")
DEFAULT_BONUS: dict[BoostName, float] = {"off": 0.0, "published": 5.0, "careful": 2.0}
DEFAULT_ARL_TOKENS = 5000.0
MIN_ARL_TOKENS = 50.0
MAX_ARL_TOKENS = 50_000.0

_METIS_ONLY = ("metis_drift", "metis_hedge", "metis_refuse", "metis_decay")
_CALIBRATED_ONLY = ("metis_arl", "metis_profile")
_ENGINE_ONLY = ("metis_slot", "metis_generation")
KEYS = (
    "metis",
    "metis_detector",
    *_METIS_ONLY,
    *_CALIBRATED_ONLY,
    "metis_boost",
    "metis_boost_bonus",
    "metis_key",
    *_ENGINE_ONLY,
)

_SWITCH = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}
_MAX_KEY_CHARS = 256

ChoiceT = TypeVar("ChoiceT", bound=str)


class KnowsProfiles(Protocol):
    """What `parse_xargs` asks of a store of reference profiles."""

    def names(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """The switches of one watched request, validated. Every field is a plain value."""

    detector: DetectorName = "metis"
    drift: float = 0.5
    hedge: float = 4.0
    refuse: float = 8.0
    decay: float = 0.85
    arl_tokens: float = DEFAULT_ARL_TOKENS
    profile: str | None = None
    boost: BoostName = "off"
    boost_bonus: float = 0.0
    key: str | None = None
    slot: int | None = None
    generation: int | None = None


def parse_xargs(
    xargs: Mapping[str, Any] | None,
    *,
    profiles: KnowsProfiles | None = None,
    from_client: bool = False,
) -> WatchOptions | None:
    """The request's switches, or None where it is not to be watched.

    Args:
        xargs: the request's extra arguments; keys that do not begin with `metis` belong to others and are passed over.
        profiles: where `metis_profile` must exist; None leaves that to the caller.
        from_client: refuse the keys that only the engine may set.

    Raises:
        InputError: with the offending key as `param`.
    """
    given = {key: value for key, value in (xargs or {}).items() if key == "metis" or key.startswith("metis_")}
    if not given:
        return None
    _refuse_unknown(given, from_client)
    if not _switch("metis", given.get("metis", True)):
        return None
    detector = _choice("metis_detector", given.get("metis_detector", "metis"), DETECTORS)
    _refuse_foreign(given, detector)
    profile = _profile(given, detector, profiles)
    boost = _choice("metis_boost", given.get("metis_boost", "off"), BOOSTS)
    hedge = _number(given, "metis_hedge", 4.0, above=0)
    refuse = _number(given, "metis_refuse", 8.0, above=0)
    return WatchOptions(
        detector=detector,
        drift=_number(given, "metis_drift", 0.5, at_least=0),
        hedge=hedge,
        refuse=refuse,
        decay=_number(given, "metis_decay", 0.85, above=0, at_most=1),
        arl_tokens=_number(given, "metis_arl", DEFAULT_ARL_TOKENS, at_least=MIN_ARL_TOKENS, at_most=MAX_ARL_TOKENS),
        profile=profile,
        boost=boost,
        boost_bonus=_number(given, "metis_boost_bonus", DEFAULT_BONUS[boost], above=0, at_most=100),
        key=_client_key(given.get("metis_key")),
        slot=_index(given, "metis_slot"),
        generation=_index(given, "metis_generation"),
    )


def _refuse_unknown(given: Mapping[str, Any], from_client: bool) -> None:
    accepted = tuple(key for key in KEYS if not (from_client and key in _ENGINE_ONLY))
    for key in given:
        if key not in accepted:
            raise InputError(f"{key} is not a key of METIS.", hint=f"Accepted are {', '.join(accepted)}.", param=key)


def _refuse_foreign(given: Mapping[str, Any], detector: DetectorName) -> None:
    foreign = _CALIBRATED_ONLY if detector == "metis" else _METIS_ONLY
    other = "calibrated" if detector == "metis" else "metis"
    for key in foreign:
        if key in given:
            raise InputError(
                f"{key} was given with the detector {detector!r}, which does not use it.",
                hint=f"Leave it out, or add metis_detector={other!r}.",
                param=key,
            )


def _profile(given: Mapping[str, Any], detector: DetectorName, profiles: KnowsProfiles | None) -> str | None:
    if detector != "calibrated":
        return None
    key = "metis_profile"
    known = profiles.names() if profiles is not None else None
    listing = f"Stored are: {', '.join(known) or 'none'}." if known is not None else "See `sparkray metis profiles`."
    if key not in given:
        raise InputError("the detector 'calibrated' needs the name of a reference profile.", hint=listing, param=key)
    name = given[key]
    if not isinstance(name, str):
        raise _wrong_type(key, name, "the name of a stored profile")
    if known is not None and name not in known:
        raise InputError(f"{key} {name!r} is not a stored profile.", hint=listing, param=key)
    return name


def _switch(key: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return value == 1
    if isinstance(value, str) and value.lower() in _SWITCH:
        return _SWITCH[value.lower()]
    raise _wrong_type(key, value, "true, false, 1, 0, 'on' or 'off'")


def _choice(key: str, value: Any, accepted: tuple[ChoiceT, ...]) -> ChoiceT:
    for name in accepted:
        if value == name:
            return name
    raise _wrong_type(key, value, " or ".join(repr(name) for name in accepted))


def _number(
    given: Mapping[str, Any],
    key: str,
    default: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> float:
    if key not in given:
        return default
    value = given[key]
    bounds = [
        f"above {above:g}" if above is not None else "",
        f"at least {at_least:g}" if at_least is not None else "",
        f"at most {at_most:g}" if at_most is not None else "",
    ]
    expected = f"a finite number {' and '.join(bound for bound in bounds if bound)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(key, value, expected)
    if (
        not _is_finite(value)
        or (above is not None and value <= above)
        or (at_least is not None and value < at_least)
        or (at_most is not None and value > at_most)
    ):
        raise InputError(f"{key} is {value!r}, and {expected} is expected.", param=key)
    return float(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the range of a float
        return False


def _client_key(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _wrong_type("metis_key", value, "text or a whole number")
    if isinstance(value, int) and value.bit_length() > 64:
        raise InputError(
            "metis_key is a number of more than 64 bits, and text or a smaller one is expected.", param="metis_key"
        )
    if len(str(value)) > _MAX_KEY_CHARS:
        raise InputError(
            f"metis_key has {len(str(value))} characters, and at most {_MAX_KEY_CHARS} are accepted.",
            param="metis_key",
        )
    return str(value)


def _index(given: Mapping[str, Any], key: str) -> int | None:
    if key not in given:
        return None
    value = given[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong_type(key, value, "a whole number of at least 0")
    return value


def _wrong_type(key: str, value: Any, expected: str) -> InputError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InputError(f"{key} is {shown}, and {expected} is expected.", param=key)
