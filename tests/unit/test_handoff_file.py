"""Rows through a file: every bit comes back, and no damaged or cut file is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from handoff_toy import ToyEngine, hello_for

from sparkray.config.handoff import DecodeConfig, WireLimits
from sparkray.errors import NotFoundError
from sparkray.handoff.errors import ProtocolError
from sparkray.handoff.kv_file import read_kv_file, write_kv_file
from sparkray.handoff.messages import Generate

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 50
LIMITS = WireLimits()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    rows = ToyEngine(DecodeConfig()).rows(PROMPT[:-1], 0)
    write_kv_file(tmp_path / "kv", hello_for(Generate("r", "t", tuple(PROMPT), 1), 0), rows, "lossless")
    return tmp_path / "kv"


def test_rows_come_back_bit_for_bit(written: Path) -> None:
    held = read_kv_file(written, LIMITS)
    expected = ToyEngine(DecodeConfig()).rows(PROMPT[:-1], 0)
    assert held.hello.prompt_tokens == 400 and (held.rows.start, held.rows.count) == (0, 399)
    for one, other in zip(
        (*held.rows.keys_L, *held.rows.values_L), (*expected.keys_L, *expected.values_L), strict=True
    ):
        assert one.tobytes() == other.tobytes()
    assert [path.name for path in written.parent.iterdir()] == ["kv"], "nothing half-written is left"


@pytest.mark.parametrize("at", [0, 40, 5_000, -3])
def test_damage_is_found(written: Path, at: int) -> None:
    data = bytearray(written.read_bytes())
    data[at] ^= 0x10
    written.write_bytes(data)
    with pytest.raises(ProtocolError):
        read_kv_file(written, LIMITS)


@pytest.mark.parametrize("keep", [0, 10, 3_000, -1])
def test_a_cut_file_is_refused(written: Path, keep: int) -> None:
    written.write_bytes(written.read_bytes()[:keep])
    with pytest.raises(ProtocolError, match="ends before"):
        read_kv_file(written, LIMITS)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        read_kv_file(tmp_path / "none", LIMITS)
