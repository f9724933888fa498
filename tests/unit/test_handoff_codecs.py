"""Codecs: exact where they promise it, within a step of their grid elsewhere, and chosen by hand-computed rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkray.config.handoff import CodecName, KvDtypeName
from sparkray.handoff.codecs import CodecRates, choose_codec, decode_rows, encode_rows, measure_codecs
from sparkray.handoff.codecs import int8 as int8_codec
from sparkray.handoff.errors import ProtocolError
from sparkray.handoff.messages import decode_kv
from sparkray.handoff.rows import KvGeometry, KvRows, concatenate, from_float32, to_float32
from sparkray.handoff.wire import Frame, FrameKind


def through(codec: CodecName, geometry: KvGeometry, keys: Any, values: Any, cut: int = 0) -> tuple[Any, Any]:
    payload = b"".join(bytes(piece) for piece in encode_rows(codec, geometry, 0, 0, keys, values))
    frame = Frame(FrameKind.KV, 0, 0, memoryview(payload[: len(payload) - cut]))
    return decode_rows(*decode_kv(frame), geometry)


def test_bfloat16_rounds_to_nearest_even() -> None:
    # 1 + 2^-8 lies between 1 (0x3F80) and 1 + 2^-7 (0x3F81): a tie, to even. 1 + 3 x 2^-8: a tie, up to 0x3F82.
    wide = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -2.5, np.inf, 1.0039064], np.float32)
    assert [hex(x) for x in from_float32(wide, "bfloat16")] == [
        "0x3f80",
        "0x3f80",
        "0x3f82",
        "0xc020",
        "0x7f80",
        "0x3f81",
    ]
    assert np.isnan(to_float32(from_float32(np.array([np.nan], np.float32), "bfloat16"), "bfloat16")).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("codec", ["raw", "lossless"])
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 5))
def test_exact_codecs_keep_every_bit(codec: CodecName, dtype: KvDtypeName, seed: int, count: int) -> None:
    if (codec, dtype) == ("lossless", "float16"):
        return
    geometry = KvGeometry(1, 3, 5, 7, dtype)
    draw = np.random.default_rng(seed)
    # Any bit patterns at all, NaN and infinity among them.
    made = [
        np.frombuffer(draw.bytes(count * 3 * width * geometry.itemsize), f"<u{geometry.itemsize}") for width in (5, 7)
    ]
    keys, values = (
        each.view(from_float32(np.zeros(1, np.float32), dtype).dtype).reshape(count, 3, -1) for each in made
    )
    back = through(codec, geometry, keys, values)
    assert back[0].tobytes() == keys.tobytes() and back[1].tobytes() == values.tobytes()


def test_lossless_takes_twelve_bits_where_exponents_are_few() -> None:
    geometry = KvGeometry(1, 1, 64, 64, "bfloat16")
    rows = from_float32(np.random.default_rng(0).standard_normal((100, 1, 64)).astype(np.float32) + 8, "bfloat16")
    pieces = encode_rows("lossless", geometry, 0, 0, rows, rows)
    # 24 of frame header, then twice: 20 of header and 12 bits for each of 6400 numbers.
    assert sum(len(bytes(piece)) for piece in pieces) == 24 + 2 * (20 + 6400 * 12 // 8)


def test_int8_by_hand() -> None:
    row = np.zeros((1, 1, 4), np.float32)
    row[0, 0] = [127, -64, 0.4, 0.6]
    # Scale 127 / 127 = 1 is a bfloat16 (0x3F80); the numbers round to 127, -64, 0, 1.
    assert int8_codec.encode(row) == b"\x80\x3f" + np.array([127, -64, 0, 1], np.int8).tobytes()
    assert int8_codec.decode(memoryview(int8_codec.encode(row)), 1, 1, 4).ravel().tolist() == [127, -64, 0, 1]


@given(seed=st.integers(0, 1000), width=st.sampled_from([24, 64, 128]), size=st.floats(1e-3, 1e3))
def test_int8_errs_by_half_a_step(seed: int, width: int, size: float) -> None:
    rows = (np.random.default_rng(seed).standard_normal((3, 2, width)) * size).astype(np.float32)
    rows[0] = 0
    geometry = KvGeometry(1, 2, width, width, "float32")
    keys, _ = through("int8", geometry, rows, rows)
    grouped = rows.reshape(3, 2, -1, int8_codec.group_of(width))
    # The scale was rounded up by at most 2^-7 of itself.
    step = np.abs(grouped).max(axis=3, keepdims=True) / 127 * (1 + 2**-7)
    assert (np.abs(keys.reshape(grouped.shape) - grouped) <= step * 0.501).all()


@given(seed=st.integers(0, 1000), count=st.integers(1, 70))
def test_k4v4_errs_by_half_a_step_and_a_rounding(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    keys = draw.standard_normal((count, 2, 64)).astype(np.float32)
    keys[:, :, 3] += 40
    values = draw.standard_normal((count, 2, 64)).astype(np.float32)
    got_keys, got_values = through("k4v4", KvGeometry(1, 2, 64, 64, "float32"), keys, values)
    for begin in range(0, count, 32):
        block = slice(begin, min(begin + 32, count))
        lowest, highest = keys[block].min(axis=0), keys[block].max(axis=0)
        # float16 keeps 11 bits: offset and 15 scales may each be off by 2^-11 of themselves.
        allowed = (highest - lowest) / 15 * 0.5 + 2**-11 * (np.abs(lowest) + np.abs(highest - lowest)) + 1e-4
        assert (np.abs(got_keys[block] - keys[block]) <= allowed).all()
    spread = values.max(axis=2, keepdims=True) - values.min(axis=2, keepdims=True)
    assert (np.abs(got_values - values) <= spread / 15 * 0.5 + 2**-11 * 2 * np.abs(values).max() + 1e-4).all()


@pytest.mark.parametrize("codec", ["raw", "int8", "k4v4", "lossless"])
def test_a_body_of_another_size_is_refused(codec: CodecName) -> None:
    geometry = KvGeometry(1, 2, 64, 64, "bfloat16")
    rows = from_float32(np.random.default_rng(1).standard_normal((4, 2, 64)).astype(np.float32), "bfloat16")
    through(codec, geometry, rows, rows)
    with pytest.raises(ProtocolError):
        through(codec, geometry, rows, rows, cut=1)


def test_rows_join_only_where_they_meet() -> None:
    def some(start: int, count: int) -> KvRows:
        rows = np.arange(start, start + count, dtype=np.float32).reshape(-1, 1, 1)
        return KvRows(start, "float32", (rows,), (-rows,))

    joined = concatenate([some(2, 3), some(5, 1)])
    assert (joined.start, joined.count) == (2, 4) and joined.keys_L[0].ravel().tolist() == [2, 3, 4, 5]
    assert joined.head(2).values_L[0].ravel().tolist() == [-2, -3]
    with pytest.raises(Exception, match="do not follow row 5"):
        concatenate([some(2, 3), some(6, 1)])


# Qwen3-Coder-30B-A3B in bfloat16: 98,304 bytes a token. 0.8 x 1.175 GB/s = 0.94 GB/s takes 9,562 tokens a second raw,
# 12,749 at 12 of 16 bits, 18,545 at 8.25 of 16.
QWEN = KvGeometry(48, 4, 128, 128, "bfloat16")
SHARES = {"raw": 1.0, "lossless": 0.75, "int8": 8.25 / 16}
FAST = dict.fromkeys(SHARES, 1e12)


@pytest.mark.parametrize(
    ("tokens_per_second", "codec"),
    [(9_500, "raw"), (9_600, "lossless"), (12_700, "lossless"), (12_800, "int8"), (50_000, "int8")],
)
def test_the_mildest_codec_that_hides_is_chosen(tokens_per_second: float, codec: CodecName) -> None:
    rates = CodecRates(tokens_per_second, 1.175e9, SHARES, FAST)
    assert choose_codec(QWEN, rates, ("raw", "lossless", "int8", "k4v4")) == codec


def test_a_codec_slower_than_the_link_is_not_chosen() -> None:
    slow = {"raw": 1e12, "lossless": 0.1e9, "int8": 0.3e9}
    assert choose_codec(QWEN, CodecRates(20_000, 1.175e9, SHARES, slow), ("raw", "lossless", "int8")) == "raw"


def test_a_single_codec_is_an_order() -> None:
    assert choose_codec(QWEN, CodecRates(1, 1e12), ("k4v4",)) == "k4v4"


def test_measured_shares_are_the_codecs_sizes() -> None:
    shares, speeds = measure_codecs(KvGeometry(1, 4, 128, 128, "bfloat16"))
    # Of 64 rows x 4 x 256 x 2 = 131,072 bytes: int8 takes half, and 2 bytes for each 64 numbers; 24 of header.
    assert shares["int8"] == (65_536 + 2_048 + 24) / 131_072 and shares["raw"] == 1 + 24 / 131_072
    assert all(speed > 0 for speed in speeds.values())
