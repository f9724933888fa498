"""The receiving end of one transfer, as a pure state: frames in, whole rows out.

Layers arrive one by one, within each layer in ascending rows. A row can be used once every layer has it; what cannot
be used yet is held, and no more than a limit of it. After a break the sender leaves out what `have` lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparkray.config.handoff import WireLimits
from sparkray.handoff.codecs.table import decode_rows
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.messages import Commit, Hello, Ranges, check_hello, decode_kv, ranges_of
from sparkray.handoff.rows import Array, KvRows
from sparkray.handoff.wire import Frame, root_digest


@dataclass(slots=True)
class _Layer:
    """Pieces of one layer that came and were not given on, by first row."""

    pieces: dict[int, tuple[Array, Array]]
    # First row that has not arrived, counting from the transfer's start without a gap.
    reached: int


class RowAssembly:
    """Collects the frames of one transfer.

    Raises:
        ProtocolError: at construction, where HELLO announces more than the limits allow.
    """

    def __init__(self, hello: Hello, limits: WireLimits) -> None:
        self.geometry = check_hello(hello, limits)
        self.hello = hello
        self._limits = limits
        self._digests: dict[int, int] = {}
        self._layers = [_Layer({}, hello.start) for _ in range(self.geometry.num_layers)]
        self._taken = hello.start
        self._pending_bytes = 0
        self.received_bytes = 0
        self.is_complete = False

    @property
    def have(self) -> Ranges:
        """Sequence numbers that arrived, for ACCEPT after a break."""
        return ranges_of(sorted(self._digests))

    @property
    def whole_rows(self) -> int:
        """Rows up to which every layer has arrived without a gap."""
        return min(layer.reached for layer in self._layers)

    @property
    def pending_bytes(self) -> int:
        """Bytes held for rows that other layers still lack."""
        return self._pending_bytes

    def add(self, frame: Frame) -> None:
        """Take one KV frame. One that is here already is dropped, if it is the same.

        Raises:
            ProtocolError: out of bounds, another frame under a known number, rows twice, or too much to hold.
        """
        known = self._digests.get(frame.sequence)
        if known is not None:
            if known != frame.digest:
                raise ProtocolError(Reason.ORDER, f"two different frames came as number {frame.sequence}.")
            return
        if len(self._digests) >= self._limits.max_frames or frame.sequence >= self._limits.max_frames:
            raise ProtocolError(
                Reason.TOO_LARGE, f"frame {frame.sequence} came; {self._limits.max_frames} frames are accepted."
            )
        part, body = decode_kv(frame)
        if part.start < self.hello.start or part.start + part.count > self.hello.num_rows:
            raise ProtocolError(
                Reason.GEOMETRY,
                f"rows {part.start} to {part.start + part.count} came, and {self.hello.start} to"
                f" {self.hello.num_rows} were announced: the decode side computes the last token's row itself.",
            )
        size = part.count * self.geometry.layer_row_bytes
        if self._pending_bytes + size > self._limits.max_pending_bytes:
            raise ProtocolError(
                Reason.TOO_LARGE,
                f"{self._pending_bytes + size} bytes wait for rows of other layers, and"
                f" {self._limits.max_pending_bytes} are held. Send the layers of a chunk one after another.",
            )
        keys, values = decode_rows(part, body, self.geometry)
        layer = self._layers[part.layer]
        if part.start < layer.reached or part.start in layer.pieces:
            raise ProtocolError(Reason.ORDER, f"rows from {part.start} of layer {part.layer} came twice.")
        layer.pieces[part.start] = (keys, values)
        while (piece := layer.pieces.get(layer.reached)) is not None:
            layer.reached += int(piece[0].shape[0])
        self._pending_bytes += size
        self._digests[frame.sequence] = frame.digest
        self.received_bytes += len(frame.payload)

    def take(self) -> KvRows | None:
        """Rows that every layer has and that were not taken before; None where there are none."""
        end = self.whole_rows
        if end == self._taken:
            return None
        pieces = [self._take_layer(layer, end) for layer in self._layers]
        rows = KvRows(
            self._taken, self.geometry.dtype, tuple(keys for keys, _ in pieces), tuple(values for _, values in pieces)
        )
        self._taken = end
        self._pending_bytes -= rows.count * self.geometry.row_bytes
        return rows

    def commit(self, commit: Commit) -> None:
        """Check that everything came.

        Raises:
            ProtocolError: frames or rows are missing, or the checksum over all frames is another.
        """
        complete = (
            commit.num_frames == len(self._digests)
            and self.have in (((0, commit.num_frames),), ())
            and commit.num_rows == self.whole_rows == self.hello.num_rows
        )
        if not complete:
            raise ProtocolError(
                Reason.CUT,
                f"the peer ended after {commit.num_frames} frames and {commit.num_rows} rows;"
                f" {len(self._digests)} frames and {self.whole_rows} of {self.hello.num_rows} rows are here.",
            )
        root = root_digest([self._digests[number] for number in range(commit.num_frames)])
        if f"{root:016x}" != commit.root:
            raise ProtocolError(Reason.CHECKSUM, "the checksum over all frames does not agree with the peer's.")
        self.is_complete = True

    def _take_layer(self, layer: _Layer, end: int) -> tuple[Array, Array]:
        keys, values = [], []
        position = self._taken
        while position < end:
            some_keys, some_values = layer.pieces.pop(position)
            excess = position + int(some_keys.shape[0]) - end
            if excess > 0:
                keep = int(some_keys.shape[0]) - excess
                layer.pieces[end] = (some_keys[keep:], some_values[keep:])
                some_keys, some_values = some_keys[:keep], some_values[:keep]
            keys.append(some_keys)
            values.append(some_values)
            position += int(some_keys.shape[0])
        if len(keys) == 1:
            return keys[0], values[0]
        return np.concatenate(keys), np.concatenate(values)
