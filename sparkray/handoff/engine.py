"""What a decode engine is: sequences that take rows, compute rows, and give logits. One protocol, small."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from sparkray.config.handoff import DecodeConfig
from sparkray.errors import InternalError
from sparkray.handoff.fingerprint import ModelIdentity
from sparkray.handoff.rope import Frequencies
from sparkray.handoff.rows import Floats, KvRows


class DecodeSequence(Protocol):
    """One conversation's rows inside an engine."""

    @property
    def num_rows(self) -> int:
        """Rows that the engine holds, from position 0 on without a gap."""
        ...

    def import_rows(self, rows: KvRows) -> None:
        """Append rows that another engine computed; `rows.start` equals `num_rows`."""
        ...

    def forward(self, token_ids: list[int]) -> Floats:
        """Compute rows of these tokens, and the logits (V,) after the last one."""
        ...

    def export_rows(self, start: int, stop: int) -> KvRows:
        """Rows in canonical form, float32."""
        ...

    def truncate(self, num_rows: int) -> None:
        """Forget all rows from `num_rows` on."""
        ...

    def close(self) -> None:
        """Give the rows' memory back."""
        ...


class DecodeEngine(Protocol):
    """A loaded model."""

    identity: ModelIdentity
    context_tokens: int

    def open_sequence(self) -> DecodeSequence:
        """A new, empty sequence.

        Raises:
            BusyError: all places are taken.
        """
        ...

    def close(self) -> None: ...


def create_engine(config: DecodeConfig) -> DecodeEngine:
    """Load the engine that the settings name.

    Raises:
        MissingExtraError: its package is not installed.
        NotFoundError: the model is not there.
    """
    if config.engine == "mlx":
        from sparkray.handoff.mlx_engine import MlxEngine

        return MlxEngine(config)
    from sparkray.handoff.llamacpp_engine import LlamaCppEngine

    return LlamaCppEngine(config)


def reconcile_frequencies(stated: Frequencies, measured: Frequencies) -> Frequencies:
    """The stated frequencies where the engine's own agree to float32's precision, else the engine's own.

    Engines round differently, and a digest knows no tolerance; a frequency that is really another one survives.
    """
    same = stated.shape == measured.shape and bool(np.allclose(stated, measured, rtol=1e-3, atol=0))
    return stated if same else measured


def check_append(num_rows: int, rows: KvRows) -> None:
    """Rows are appended where the sequence ends.

    Raises:
        InternalError: a gap or an overlap, which would shift every position after it.
    """
    if rows.start != num_rows:
        raise InternalError(f"rows from {rows.start} on were to be appended to a sequence of {num_rows}.")
