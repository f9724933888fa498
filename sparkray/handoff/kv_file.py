"""Rows in a file, for machines without a link: the frames of a transfer, one after another, checked when read.

    HELLO, KV x N, COMMIT

The file of a finished transfer is whole or it is not there: it is written beside its place and renamed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparkray.config.handoff import CodecName, WireLimits
from sparkray.errors import NotFoundError
from sparkray.handoff.assembly import RowAssembly
from sparkray.handoff.codecs import encode_rows
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.messages import Commit, Hello, encode_message, expect
from sparkray.handoff.rows import KvRows, concatenate
from sparkray.handoff.wire import FrameKind, FrameReader, encode_header, root_digest

# Rows of one frame: what is read back is assembled piece by piece.
_FRAME_ROWS = 256
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class KvFile:
    """What a file holds.

    Attributes:
        hello: whose rows, of which model and prompt; compare its identity before the rows are used.
        rows: all of them.
    """

    hello: Hello
    rows: KvRows


def write_kv_file(path: Path, hello: Hello, rows: KvRows, codec: CodecName = "raw") -> None:
    """Write rows `hello.start ..` of all layers.

    Args:
        path: the file; replaced where it exists.
        hello: names model and prompt; its geometry is the rows'.
        rows: as many as the prompt has tokens, less one and those before the start.
    """
    digests: list[int] = []
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(encode_message(hello))
        for first in range(0, rows.count, _FRAME_ROWS):
            for layer, (keys, values) in enumerate(zip(rows.keys_L, rows.values_L, strict=True)):
                part = slice(first, first + _FRAME_ROWS)
                pieces = encode_rows(codec, hello.kv_geometry, layer, rows.start + first, keys[part], values[part])
                header, digest = encode_header(FrameKind.KV, tuple(pieces), len(digests))
                digests.append(digest)
                file.write(header)
                for piece in pieces:
                    file.write(piece)
        file.write(encode_message(Commit(len(digests), hello.num_rows, f"{root_digest(digests):016x}")))
    partial.replace(path)


def read_kv_file(path: Path, limits: WireLimits) -> KvFile:
    """Read a file whole, checking every frame and the sum of all.

    Raises:
        NotFoundError: it is not there.
        ProtocolError: it is damaged, cut, or holds more than the limits allow.
    """
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist, and a file of a handoff is expected.")
    reader = FrameReader(limits)
    assembly: RowAssembly | None = None
    parts: list[KvRows] = []
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            for frame in reader.feed(data):
                if assembly is None:
                    assembly = RowAssembly(expect(frame, Hello), limits)
                elif frame.kind is FrameKind.KV and not assembly.is_complete:
                    assembly.add(frame)
                    if (rows := assembly.take()) is not None:
                        parts.append(rows)
                else:
                    assembly.commit(expect(frame, Commit))
    if assembly is None or not assembly.is_complete or not reader.is_between_frames or not parts:
        raise ProtocolError(Reason.CUT, f"{path} ends before its transfer does.")
    return KvFile(assembly.hello, concatenate(parts))
