"""Shared memory through which recorded tokens leave the engine's process.

The file, all little-endian and in this order:

    preamble   8 x int64                       magic, version, num_slots, max_tokens, columns of a record, 0, 0, 0
    owner      num_slots x int64               the slot's generation; written by the owner (the request side) only
    progress   num_slots x 4 int64             generation, committed, written, restarts; written by the writer only
    records    num_slots x max_tokens x (F+1)  float32: the F of `TOKEN_FIELDS`, then a stamp made of the generation

A request holds one slot from `claim` to `release`; both raise the slot's generation. A write carries the generation
that its request was given and is dropped where that is no longer the slot's; should a write slip in between the test
and a release, its stamp gives it away to the reader. So a late writer never shows up in another request's trace.

`committed` is the position of the latest token written: every token before it has been accepted by the engine, while
the latest one may still be computed anew (a prompt in pieces) or be rejected (a speculated token).

Names are `sparkray-metis-<user>-<number>.arena` with the lowest free number, so that the path is the same from one
start to the next (it is part of vLLM's compile-cache key). The owner holds a file lock as long as it lives: what
a crashed owner left behind is found by its free lock and removed when the next arena is created.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparkray.errors import BusyError, InternalError, UnavailableError
from sparkray.metis.fields import NUM_FIELDS

_MAGIC = 0x5350_4B4D_4554_4953
_VERSION = 1
_PREAMBLE_WORDS = 8
_PROGRESS_WORDS = 4
_RECORD_COLUMNS = NUM_FIELDS + 1
# Generations are told apart by their remainder, which a float32 holds exactly.
_STAMP_RANGE = 1 << 24
_MAX_ARENAS = 1024

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Slot:
    """A claimed place in the arena; valid until released."""

    index: int
    generation: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the writer is with a slot.

    Attributes:
        committed: tokens that the engine has accepted.
        written: tokens recorded, the latest of which may not be final.
        restarts: times the detector had to start anew because its earlier state was lost.
    """

    committed: int = 0
    written: int = 0
    restarts: int = 0


def default_directory() -> Path:
    """/dev/shm where it exists, else the folder for temporary files."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


class TraceArena:
    """A bounded, fixed-size table of recorded tokens in shared memory.

    One process creates it and claims, reads and releases slots, from one thread; the engine's worker attaches to the
    same path and writes.
    """

    def __init__(self, path: Path, descriptor: int, *, owner: bool) -> None:
        self.path = path
        self._descriptor = descriptor
        self._owner = owner
        self._map = mmap.mmap(descriptor, 0)
        preamble = np.frombuffer(self._map, dtype="<i8", count=_PREAMBLE_WORDS)
        self.num_slots, self.max_tokens = int(preamble[2]), int(preamble[3])
        offset = preamble.nbytes
        self._generations = np.frombuffer(self._map, dtype="<i8", count=self.num_slots, offset=offset)
        offset += self._generations.nbytes
        self._progress = np.frombuffer(
            self._map, dtype="<i8", count=self.num_slots * _PROGRESS_WORDS, offset=offset
        ).reshape(self.num_slots, _PROGRESS_WORDS)
        offset += self._progress.nbytes
        self._records = np.frombuffer(self._map, dtype="<f4", offset=offset).reshape(
            self.num_slots, self.max_tokens, _RECORD_COLUMNS
        )
        self._free: deque[int] = deque(range(self.num_slots) if owner else ())

    @classmethod
    def create(cls, num_slots: int, max_tokens: int, directory: Path | None = None) -> TraceArena:
        """Create an arena, removing what crashed owners left in the same folder.

        Args:
            num_slots: requests that can be recorded at one time.
            max_tokens: tokens recorded of one request; later ones are dropped.
            directory: where the file is put; by default `default_directory()`, or the folder for temporary files
                where the first has not enough room.

        Raises:
            UnavailableError: no folder has room for the file, or none can be written to.
        """
        folders = [directory] if directory else [default_directory(), Path(tempfile.gettempdir())]
        num_bytes = _file_bytes(num_slots, max_tokens)
        failure: OSError | None = None
        for folder in folders:
            try:
                path, descriptor = _create_file(folder, num_bytes)
            except OSError as error:
                failure = error
                continue
            words = np.array([_MAGIC, _VERSION, num_slots, max_tokens, _RECORD_COLUMNS, 0, 0, 0], dtype="<i8")
            os.pwrite(descriptor, words.tobytes(), 0)
            return cls(path, descriptor, owner=True)
        raise UnavailableError(
            f"no room for the {num_bytes / 2**20:.0f} MiB of trace memory in "
            f"{' or '.join(map(str, folders))} ({failure.strerror if failure else 'no folder'}).",
            hint="Lower metis.max_trace_tokens or the engine's max_num_seqs, or enlarge /dev/shm.",
        )

    @classmethod
    def attach(cls, path: Path) -> TraceArena:
        """Open an arena that another process created, for writing or reading.

        Raises:
            UnavailableError: there is no arena of this version at `path`.
        """
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise UnavailableError(
                f"the trace memory {path} cannot be opened ({error.strerror}).",
                hint="The worker that samples must run on the host of the process that starts the engine.",
            ) from error
        preamble = np.frombuffer(os.pread(descriptor, 8 * _PREAMBLE_WORDS, 0), dtype="<i8")
        if preamble.tolist()[:2] != [_MAGIC, _VERSION] or preamble[4] != _RECORD_COLUMNS:
            os.close(descriptor)
            raise UnavailableError(f"{path} is not trace memory of version {_VERSION}.")
        return cls(path, descriptor, owner=False)

    @property
    def num_active(self) -> int:
        """Slots that are claimed; known to the creator only."""
        return self.num_slots - len(self._free)

    def claim(self) -> Slot:
        """Take the slot that has been free longest.

        Raises:
            BusyError: all slots are taken.
        """
        if not self._free:
            raise BusyError(f"all {self.num_slots} slots of the trace memory are taken.")
        index = self._free.popleft()
        self._generations[index] += 1
        return Slot(index, int(self._generations[index]))

    def release(self, slot: Slot) -> None:
        """Give a slot back; writes that still carry its generation are dropped from now on."""
        if self._generations[slot.index] != slot.generation:
            raise InternalError(f"slot {slot.index} of the trace memory was released twice.")
        self._generations[slot.index] += 1
        self._free.append(slot.index)

    def write(
        self,
        slots_B: IntArray,
        generations_B: IntArray,
        positions_B: IntArray,
        tokens_BF: FloatArray,
        *,
        committed_B: IntArray | None = None,
        restarted_B: BoolArray | None = None,
    ) -> None:
        """Record B tokens, in one scatter: one for each request, or several where drafts were verified.

        Args:
            slots_B: slot numbers; a negative one is a request without a slot.
            generations_B: the generations those slots were claimed with.
            positions_B: index of each token within its request's output, from 0.
            tokens_BF: the numbers, in the order of `TOKEN_FIELDS`.
            committed_B: tokens that the engine had accepted before this step; by default the positions. Of several
                rows of one request the last one counts.
            restarted_B: rows whose detector started anew at this token.
        """
        committed_B = positions_B if committed_B is None else committed_B
        restarted_B = np.zeros(slots_B.size, dtype=np.bool_) if restarted_B is None else restarted_B
        alive_B = (slots_B >= 0) & (self._generations[slots_B] == generations_B)
        if not alive_B.all():
            slots_B, generations_B, positions_B = slots_B[alive_B], generations_B[alive_B], positions_B[alive_B]
            tokens_BF, committed_B, restarted_B = tokens_BF[alive_B], committed_B[alive_B], restarted_B[alive_B]
        if not slots_B.size:
            return
        old = self._progress[slots_B]
        restarts_B = np.where(old[:, 0] == generations_B, old[:, 3], 0) + restarted_B
        fits_B = positions_B < self.max_tokens
        kept_slots_B = slots_B[fits_B]
        records = np.empty((kept_slots_B.size, _RECORD_COLUMNS), dtype=np.float32)
        records[:, :NUM_FIELDS] = tokens_BF[fits_B]
        records[:, NUM_FIELDS] = generations_B[fits_B] % _STAMP_RANGE
        self._records[kept_slots_B, positions_B[fits_B]] = records
        # Last, so that a reader who sees the new count also sees the records it counts.
        self._progress[slots_B] = np.stack([generations_B, committed_B, positions_B + 1, restarts_B], axis=1)

    def progress(self, slot: Slot) -> Progress:
        """How far the writer is; all zero before its first token and after the slot's release."""
        generation, committed, written, restarts = self._progress[slot.index].tolist()
        return Progress(committed, written, restarts) if generation == slot.generation else Progress()

    def read(self, slot: Slot, start: int, stop: int) -> FloatArray:
        """Copy of the tokens start..stop of a slot, in the order of `TOKEN_FIELDS`; a token never recorded is NaN."""
        records = self._records[slot.index, start : min(stop, self.max_tokens)].copy()
        records[records[:, NUM_FIELDS] != slot.generation % _STAMP_RANGE] = np.nan
        return records[:, :NUM_FIELDS]

    def close(self) -> None:
        """Let go of the memory; the creator also removes the file."""
        if self._owner:
            self.path.unlink(missing_ok=True)
        # Views of the map are alive as long as this object is, so the map goes with it, not now.
        os.close(self._descriptor)


def _file_bytes(num_slots: int, max_tokens: int) -> int:
    return 8 * (_PREAMBLE_WORDS + num_slots * (1 + _PROGRESS_WORDS)) + 4 * num_slots * max_tokens * _RECORD_COLUMNS


def _create_file(folder: Path, num_bytes: int) -> tuple[Path, int]:
    """A new locked file of `num_bytes` zeros under the lowest free number."""
    for number in range(_MAX_ARENAS):
        path = folder / f"sparkray-metis-{os.getuid()}-{number}.arena"
        _remove_leftover(path)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except FileExistsError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_linked(path, descriptor):
                raise BlockingIOError
            # Reserved, not only declared: a page that cannot be had later would be a SIGBUS in the engine.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, num_bytes)
            else:
                os.ftruncate(descriptor, num_bytes)
        except BlockingIOError:
            # Another creator took the file for a leftover in the moment before it was locked, and removed it.
            os.close(descriptor)
            continue
        except OSError:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        return path, descriptor
    raise UnavailableError(f"{folder} holds {_MAX_ARENAS} arenas in use.", hint="Stop servers that are not needed.")


def _is_linked(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _remove_leftover(path: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)
