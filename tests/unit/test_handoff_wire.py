"""Frames and messages: byte for byte by hand, then 100,000 damaged ones."""

from __future__ import annotations

import random
import resource
import struct
from typing import Any

import numpy as np
import pytest
import xxhash

from sparkray.config.handoff import WireLimits
from sparkray.handoff.assembly import RowAssembly
from sparkray.handoff.codecs import encode_rows
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.messages import (
    Abort,
    Accept,
    Commit,
    Done,
    Generate,
    Hello,
    Tokens,
    check_hello,
    decode_message,
    encode_message,
    expect,
    ranges_of,
)
from sparkray.handoff.rows import KvGeometry
from sparkray.handoff.wire import (
    HEADER_BYTES,
    FrameKind,
    FrameReader,
    encode_frame,
    encode_header,
    parse_header,
    root_digest,
)

LIMITS = WireLimits()
GEOMETRY = KvGeometry(2, 1, 4, 4, "float32")


def hello(**changes: Any) -> Hello:
    values: dict[str, Any] = {
        "request": "r", "ticket": "t", "fingerprint": "f", "identity": {}, "prompt_hash": "h", "prompt_tokens": 7,
        "start": 0, "codecs": ("raw",),
        "geometry": {"num_layers": 2, "num_kv_heads": 1, "key_dim": 4, "value_dim": 4, "dtype": "float32"},
    }  # fmt: skip
    return Hello(**{**values, **changes})


def layer_rows(layer: int, start: int, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys 1000 layer + 10 row + channel, values their negatives."""
    keys = 1000.0 * layer + 10.0 * np.arange(start, start + count)[:, None, None] + np.arange(4.0)
    return keys.astype("<f4"), -keys.astype("<f4")


def kv_frame(sequence: int, layer: int, start: int, count: int, codec: str = "raw") -> bytes:
    pieces = encode_rows(codec, GEOMETRY, layer, start, *layer_rows(layer, start, count))  # type: ignore[arg-type]
    header, _ = encode_header(FrameKind.KV, tuple(pieces), sequence)
    return header + b"".join(bytes(piece) for piece in pieces)


def frames_of(data: bytes) -> list[Any]:
    return list(FrameReader(LIMITS).feed(data))


def test_a_frame_is_laid_out_as_documented() -> None:
    frame = encode_frame(FrameKind.ABORT, b"{}", sequence=0)
    prefix = b"SPKV" + struct.pack("<HHIIQ", 1, 5, 0, 0, 2)
    assert frame == prefix + struct.pack("<Q", xxhash.xxh3_64_intdigest(prefix + b"{}")) + b"{}"
    assert HEADER_BYTES == 32


def test_a_kv_frame_is_laid_out_as_documented() -> None:
    body = kv_frame(3, layer=1, start=5, count=1)[HEADER_BYTES:]
    assert body[:24] == struct.pack("<IIIBBHQ", 1, 5, 1, 0, 0, 0, 32)
    assert np.frombuffer(body[24:], "<f4").tolist() == [1050, 1051, 1052, 1053, -1050, -1051, -1052, -1053]


def test_frames_come_out_whole_from_any_pieces() -> None:
    data = encode_frame(FrameKind.ABORT, b"one") + encode_frame(FrameKind.ACK, b"") + kv_frame(9, 0, 0, 2)
    reader = FrameReader(LIMITS)
    found = [frame for index in range(len(data)) for frame in reader.feed(data[index : index + 1])]
    assert [(frame.kind, frame.sequence, len(frame.payload)) for frame in found] == [
        (FrameKind.ABORT, 0, 3), (FrameKind.ACK, 0, 0), (FrameKind.KV, 9, 24 + 64),
    ]  # fmt: skip
    assert reader.is_between_frames


@pytest.mark.parametrize(
    ("at", "byte", "reason"),
    [(0, 0x00, Reason.MALFORMED), (4, 9, Reason.VERSION), (6, 99, Reason.MALFORMED), (12, 1, Reason.MALFORMED),
     (19, 0xFF, Reason.TOO_LARGE), (24, 0xAA, Reason.CHECKSUM), (33, 0xAA, Reason.CHECKSUM)],
)  # fmt: skip
def test_damage_is_named(at: int, byte: int, reason: Reason) -> None:
    frame = bytearray(encode_frame(FrameKind.ABORT, b'{"reason":"x"}'))
    frame[at] = byte
    with pytest.raises(ProtocolError) as caught:
        frames_of(bytes(frame))
    assert caught.value.reason is reason


def test_a_length_is_judged_before_memory_is_taken() -> None:
    limits = WireLimits(max_frame_bytes=1024, max_control_bytes=2048)
    header = struct.pack("<4sHHIIQQ", b"SPKV", 1, FrameKind.KV, 0, 0, 1025, 0)
    with pytest.raises(ProtocolError, match="1025 bytes was announced; 1024"):
        parse_header(header, limits)
    assert parse_header(struct.pack("<4sHHIIQQ", b"SPKV", 1, 5, 0, 0, 1025, 0), limits).payload_bytes == 1025


def test_messages_read_back() -> None:
    for message in (
        hello(), Accept("int8", 5, ((0, 3), (7, 9))), Commit(3, 6, "00ff"), Abort("busy", "later"),
        Generate("r", "t", (1, 2, 3), 5, resume=(4,)), Tokens(2, (5, 6), (0.5, 1.5)),
        Done("stop", "full", kv_bytes=7, times={"first": 0.25}),
    ):  # fmt: skip
        (frame,) = frames_of(encode_message(message))
        assert decode_message(frame) == message


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"reason":1}', b'{"reason":"x","more":1}', b"[" * 100_000])
def test_other_json_is_refused(body: bytes) -> None:
    (frame,) = frames_of(encode_frame(FrameKind.ABORT, body))
    with pytest.raises(ProtocolError) as caught:
        expect(frame, Abort)
    assert caught.value.reason is Reason.MALFORMED


def test_another_message_than_the_next_is_refused() -> None:
    (frame,) = frames_of(encode_message(Abort("busy")))
    with pytest.raises(ProtocolError, match="ABORT frame came where HELLO"):
        expect(frame, Hello)


@pytest.mark.parametrize(
    ("changes", "limits", "reason"),
    [
        ({"prompt_tokens": 1}, {}, Reason.MALFORMED),
        ({"start": 7}, {}, Reason.MALFORMED),
        ({"prompt_tokens": 101}, {"max_prompt_tokens": 100}, Reason.TOO_LARGE),
        # 6 rows x 2 layers x 8 channels x 4 bytes = 384
        ({}, {"max_kv_bytes": 383}, Reason.TOO_LARGE),
        ({}, {"max_layers": 1}, Reason.TOO_LARGE),
        ({}, {"max_row_bytes": 31}, Reason.TOO_LARGE),
    ],
)
def test_hello_is_judged_by_the_limits(changes: dict[str, Any], limits: dict[str, int], reason: Reason) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_hello(hello(**changes), WireLimits(**limits))
    assert caught.value.reason is reason
    assert check_hello(hello(), WireLimits(max_kv_bytes=384, max_layers=2, max_row_bytes=32)) == GEOMETRY


def test_ranges() -> None:
    assert ranges_of([0, 1, 2, 5, 7, 8]) == ((0, 3), (5, 6), (7, 9))
    assert ranges_of([]) == ()


def test_rows_are_given_once_every_layer_has_them() -> None:
    assembly = RowAssembly(hello(), LIMITS)
    sent = [kv_frame(0, 0, 0, 4), kv_frame(1, 1, 0, 3), kv_frame(2, 0, 4, 2), kv_frame(3, 1, 3, 3)]
    frames = [frame for data in sent for frame in frames_of(data)]
    assembly.add(frames[0])
    assert assembly.take() is None and assembly.pending_bytes == 4 * 32
    assembly.add(frames[1])
    first = assembly.take()
    assert first is not None and (first.start, first.count) == (0, 3)
    assert first.keys_L[1][2, 0].tolist() == [1020, 1021, 1022, 1023]
    assert assembly.pending_bytes == 32, "one row of layer 0 waits"
    assembly.add(frames[3])
    assembly.add(frames[2])
    second = assembly.take()
    assert second is not None and (second.start, second.count) == (3, 3)
    assert second.keys_L[0][:, 0, 0].tolist() == [30, 40, 50] and second.values_L[1][0, 0, 0] == -1030
    assert assembly.have == ((0, 4),) and assembly.pending_bytes == 0
    root = root_digest([frame.digest for frame in frames])
    with pytest.raises(ProtocolError, match="checksum over all"):
        assembly.commit(Commit(4, 6, f"{root ^ 1:016x}"))
    assembly.commit(Commit(4, 6, f"{root:016x}"))
    assert assembly.is_complete


def test_a_transfer_that_ended_early_is_not_committed() -> None:
    assembly = RowAssembly(hello(), LIMITS)
    frames = frames_of(kv_frame(0, 0, 0, 6) + kv_frame(2, 1, 0, 5))
    for frame in frames:
        assembly.add(frame)
    assert assembly.have == ((0, 1), (2, 3)) and assembly.whole_rows == 5
    with pytest.raises(ProtocolError) as caught:
        assembly.commit(Commit(2, 6, f"{root_digest([f.digest for f in frames]):016x}"))
    assert caught.value.reason is Reason.CUT


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        # Row 6 is the last token's: the decode side computes it. N rows where N - 1 belong are refused.
        ([kv_frame(0, 0, 0, 7)], Reason.GEOMETRY),
        ([kv_frame(0, 2, 0, 1)], Reason.GEOMETRY),
        ([kv_frame(0, 0, 0, 2), kv_frame(1, 0, 1, 2)], Reason.ORDER),
        ([kv_frame(0, 0, 0, 2), kv_frame(0, 0, 0, 3)], Reason.ORDER),
        ([kv_frame(1 << 20, 0, 0, 2)], Reason.TOO_LARGE),
    ],
)
def test_rows_out_of_place_are_refused(frames: list[bytes], reason: Reason) -> None:
    assembly = RowAssembly(hello(), LIMITS)
    with pytest.raises(ProtocolError) as caught:
        for frame in frames_of(b"".join(frames)):
            assembly.add(frame)
    assert caught.value.reason is reason


def test_a_repeated_frame_counts_once() -> None:
    assembly = RowAssembly(hello(), LIMITS)
    for frame in frames_of(kv_frame(0, 0, 0, 2) * 2):
        assembly.add(frame)
    assert assembly.received_bytes == 24 + 64 and assembly.pending_bytes == 64


def test_rows_that_wait_are_bounded() -> None:
    assembly = RowAssembly(hello(), WireLimits(max_pending_bytes=1024, max_frame_bytes=1024))
    assembly2 = RowAssembly(hello(prompt_tokens=100), WireLimits(max_pending_bytes=1024, max_frame_bytes=1024))
    assembly.add(frames_of(kv_frame(0, 0, 0, 6))[0])
    with pytest.raises(ProtocolError, match="1056 bytes wait"):
        for number in range(33):
            assembly2.add(frames_of(kv_frame(number, 0, number, 1))[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_100_000_damaged_frames_do_no_harm() -> None:
    """Every one is refused or taken; none raises anything else, hangs, or grows memory."""
    draw = random.Random(5)
    seeds = [kv_frame(0, 0, 0, 4), kv_frame(1, 1, 0, 6, "int8"), kv_frame(2, 0, 0, 5, "k4v4"),
             kv_frame(3, 1, 2, 4, "lossless"), encode_message(hello()), encode_message(Commit(2, 6, "00")),
             encode_message(Generate("r", "t", tuple(range(40)), 5))]  # fmt: skip
    limits = WireLimits(max_frame_bytes=1 << 20, max_control_bytes=1 << 20, max_pending_bytes=1 << 20)
    outcomes: dict[str, int] = {}
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(100_000):
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(data))
            data[at] = draw.choice((draw.randrange(256), 0, 255, data[at] ^ 1 << draw.randrange(8)))
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        # Half of them get a checksum that agrees, so that the layers behind it are reached.
        if number % 2 and len(data) >= HEADER_BYTES:
            data[16:24] = struct.pack("<Q", len(data) - HEADER_BYTES)
            data[24:32] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data[:24] + data[32:])))
        assembly = RowAssembly(hello(), limits)
        outcome = "taken"
        try:
            for frame in FrameReader(limits).feed(bytes(data)):
                if frame.kind is FrameKind.KV:
                    assembly.add(frame)
                    assembly.take()
                else:
                    message = decode_message(frame)
                    if isinstance(message, Hello):
                        check_hello(message, limits)
                    elif isinstance(message, Commit):
                        assembly.commit(message)
        except ProtocolError as refusal:
            outcome = refusal.reason
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 32 << 10
    assert sum(outcomes.values()) == 100_000
    assert {Reason.CHECKSUM, Reason.MALFORMED, Reason.VERSION, Reason.TOO_LARGE, Reason.GEOMETRY} <= outcomes.keys()
