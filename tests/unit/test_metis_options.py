"""What a request may say about being watched, and what it may not."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.errors import InputError
from sparkray.metis.options import KEYS, WatchOptions, parse_xargs


class Profiles:
    def names(self) -> tuple[str, ...]:
        return ("tiny/t0.7/chat",)


@pytest.mark.parametrize("xargs", [None, {}, {"other": 1}, {"metistic": "x"}, {"metis": False}, {"metis": "OFF"}])
def test_not_watched(xargs: dict[str, Any] | None) -> None:
    assert parse_xargs(xargs) is None


@pytest.mark.parametrize("value", [0, "0", "false", "False", "off"])
def test_an_explicit_off_wins_over_other_keys(value: object) -> None:
    assert parse_xargs({"metis": value, "metis_hedge": 3}) is None


@pytest.mark.parametrize("value", [True, 1, "1", "on", "On", "true", "TRUE"])
def test_on_gives_the_published_numbers(value: object) -> None:
    assert parse_xargs({"metis": value}) == WatchOptions(
        detector="metis", drift=0.5, hedge=4.0, refuse=8.0, decay=0.85, boost="off", boost_bonus=0.0
    )


def test_another_key_alone_means_on() -> None:
    options = parse_xargs({"metis_hedge": 3, "temperature_like": 2})
    assert options is not None
    assert options.hedge == 3.0


def test_every_key_is_read() -> None:
    got = parse_xargs(
        {
            "metis": "on",
            "metis_detector": "metis",
            "metis_drift": 0,
            "metis_hedge": 1.5,
            "metis_refuse": 2,
            "metis_decay": 1,
            "metis_boost": "careful",
            "metis_boost_bonus": 0.5,
            "metis_key": 17,
            "metis_slot": 3,
            "metis_generation": 9,
        }
    )
    assert got == WatchOptions(
        detector="metis",
        drift=0.0,
        hedge=1.5,
        refuse=2.0,
        decay=1.0,
        boost="careful",
        boost_bonus=0.5,
        key="17",
        slot=3,
        generation=9,
    )
    assert pickle.loads(pickle.dumps(got)) == got


def test_calibrated() -> None:
    got = parse_xargs(
        {"metis_detector": "calibrated", "metis_profile": "tiny/t0.7/chat", "metis_arl": 800}, profiles=Profiles()
    )
    assert got is not None
    assert (got.detector, got.profile, got.arl_tokens) == ("calibrated", "tiny/t0.7/chat", 800.0)


@pytest.mark.parametrize("boost", ["published", "careful"])
def test_the_careful_bonus_is_smaller(boost: Any) -> None:
    got = parse_xargs({"metis_boost": boost})
    assert got is not None
    assert got.boost_bonus == {"published": 5.0, "careful": 2.0}[boost]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metis", None),
        ("metis", 2),
        ("metis", 1.0),
        ("metis", "yes"),
        ("metis", []),
        ("metis", {}),
        ("metis_detector", "cusum"),
        ("metis_detector", None),
        ("metis_detector", 1),
        ("metis_boost", "always"),
        ("metis_boost", True),
        ("metis_hedge", math.nan),
        ("metis_hedge", math.inf),
        ("metis_hedge", 0),
        ("metis_hedge", -1),
        ("metis_hedge", "4"),
        ("metis_hedge", True),
        ("metis_hedge", [4]),
        ("metis_hedge", 10**400),
        ("metis_refuse", math.nan),
        ("metis_refuse", 0.0),
        ("metis_drift", -0.1),
        ("metis_drift", math.nan),
        ("metis_decay", 0),
        ("metis_decay", 1.01),
        ("metis_decay", math.nan),
        ("metis_boost_bonus", 0),
        ("metis_boost_bonus", 101),
        ("metis_boost_bonus", math.nan),
        ("metis_key", 1.5),
        ("metis_key", True),
        ("metis_key", "x" * 257),
        ("metis_key", 10**400),
        ("metis_slot", -1),
        ("metis_slot", 1.0),
        ("metis_slot", "1"),
        ("metis_generation", True),
        ("metis_threshold", 4),
        ("metis_", 1),
        ("metis_arl", 100),
        ("metis_profile", "tiny/t0.7/chat"),
    ],
)
def test_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        parse_xargs({"metis": True, key: value})
    assert caught.value.param == key
    assert key in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metis_arl", math.nan),
        ("metis_arl", 49),
        ("metis_arl", 50_001),
        ("metis_arl", "500"),
        ("metis_profile", "other/t0.7/chat"),
        ("metis_profile", 3),
        ("metis_profile", "../../etc/passwd"),
        ("metis_drift", 0.5),
        ("metis_hedge", 4),
        ("metis_refuse", 4),
        ("metis_decay", 0.9),
    ],
)
def test_refused_with_the_calibrated_detector(key: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        parse_xargs(
            {"metis_detector": "calibrated", "metis_profile": "tiny/t0.7/chat", key: value}, profiles=Profiles()
        )
    assert caught.value.param == key


def test_calibrated_without_profile_lists_the_stored_ones() -> None:
    with pytest.raises(InputError, match=r"tiny/t0\.7/chat") as caught:
        parse_xargs({"metis_detector": "calibrated"}, profiles=Profiles())
    assert caught.value.param == "metis_profile"


@pytest.mark.parametrize("key", ["metis_slot", "metis_generation"])
def test_a_client_may_not_say_what_the_engine_says(key: str) -> None:
    assert parse_xargs({key: 1}) is not None
    with pytest.raises(InputError, match="is not a key") as caught:
        parse_xargs({key: 1}, from_client=True)
    assert caught.value.param == key
    assert key not in (caught.value.hint or "")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3)
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5))
def test_anything_is_read_or_refused(xargs: dict[str, Any]) -> None:
    try:
        options = parse_xargs(xargs)
    except InputError as error:
        assert error.param in xargs or error.param == "metis_profile"
        return
    if options is not None:
        assert all(
            math.isfinite(number) for number in (options.drift, options.hedge, options.refuse, options.boost_bonus)
        )
        assert options.hedge > 0
        assert 0 < options.decay <= 1
