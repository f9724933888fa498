"""The probe of a pairing: one fixed prompt through both engines, rows and logits compared before a user is served.

A fingerprint compares what sides state. The canary finds what nobody states: a permutation left out, a cache that is
turned by a Hadamard matrix, pages read in another layout, rows shifted by one, weights that are not the ones named.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sparkray.handoff.compare import kl_divergence, row_errors
from sparkray.handoff.engine import DecodeEngine
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.rows import KvRows

PROBE_TOKENS = 96
# Tokens that are forced after the probe, to compare distributions.
FORCED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What two sides of a kind may differ by.

    Measured with the embedded model: float32 rows 2e-6 to 4e-5, divergence below 1e-6; bfloat16 rows 2e-2; a decode
    side with 4-bit weights rows 0.11, divergence 3e-3. Every planted fault moves rows by 0.5 and more.
    """

    rows: float
    kl: float


EXACT = Tolerance(rows=1e-3, kl=1e-4)
ROUNDED = Tolerance(rows=0.1, kl=0.02)
QUANTISED = Tolerance(rows=0.35, kl=0.25)


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """What the probe found.

    Attributes:
        keys_error: largest relative difference of keys over all layers.
        values_error: the same for values.
        worst_layer: the layer of the larger one.
        kl: mean divergence of the next tokens' distributions from this engine's own.
        top1_share: share of them whose likeliest token is the same.
        tolerance_rows: accepted difference.
        tolerance_kl: accepted divergence.
    """

    keys_error: float
    values_error: float
    worst_layer: int
    kl: float
    top1_share: float
    tolerance_rows: float
    tolerance_kl: float

    @property
    def passed(self) -> bool:
        return max(self.keys_error, self.values_error) <= self.tolerance_rows and self.kl <= self.tolerance_kl

    def to_wire(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def check(self) -> None:
        """Refuse the pair where the probe failed.

        Raises:
            ProtocolError: with the numbers.
        """
        if not self.passed:
            raise ProtocolError(
                Reason.CANARY,
                f"the probe differs between the two engines: keys by {self.keys_error:.3g}, values by"
                f" {self.values_error:.3g} (layer {self.worst_layer}), divergence {self.kl:.3g};"
                f" {self.tolerance_rows:g} and {self.tolerance_kl:g} are accepted.",
                hint="Compare weights, rotary base and cache types of both sides.",
            )


def probe_tokens(vocabulary: int, num_tokens: int = PROBE_TOKENS) -> list[int]:
    """The probe: spread over the vocabulary, the same for every model of its size."""
    return [int(token) for token in np.random.default_rng(96).integers(0, vocabulary, num_tokens)]


def tolerance_for(prefill_weights: str, decode_weights: str, dtypes: tuple[str, str]) -> Tolerance:
    """What a pair of weights and types may differ by."""
    plain = {"float32", "F32", "bfloat16", "BF16", "float16", "F16"}
    if prefill_weights not in plain or decode_weights not in plain:
        return QUANTISED
    return EXACT if set(dtypes) == {"float32"} else ROUNDED


def run_canary(engine: DecodeEngine, prompt: list[int], rows: list[KvRows], tolerance: Tolerance) -> CanaryReport:
    """Compare rows that came with this engine's own, and what follows from either.

    Args:
        engine: the decode engine; two of its sequences are used.
        prompt: the probe.
        rows: received rows of all but its last token, in order.
        tolerance: what is accepted.
    """
    own, handed = engine.open_sequence(), engine.open_sequence()
    try:
        reference_logits = own.forward(prompt)
        for part in rows:
            handed.import_rows(part)
        logits = handed.forward(prompt[-1:])
        errors_K, errors_V = [0.0] * len(rows[0].keys_L), [0.0] * len(rows[0].keys_L)
        for part in rows:
            part_K, part_V = row_errors(part, own.export_rows(part.start, part.start + part.count))
            errors_K = [max(pair) for pair in zip(errors_K, part_K, strict=True)]
            errors_V = [max(pair) for pair in zip(errors_V, part_V, strict=True)]
        divergences, agreements = [], []
        for _ in range(FORCED_TOKENS):
            divergences.append(kl_divergence(logits, reference_logits))
            token = int(reference_logits.argmax())
            agreements.append(int(logits.argmax()) == token)
            logits, reference_logits = handed.forward([token]), own.forward([token])
    finally:
        own.close()
        handed.close()
    worst = [max(pair) for pair in zip(errors_K, errors_V, strict=True)]
    return CanaryReport(
        max(errors_K), max(errors_V), int(np.argmax(worst)), float(np.mean(divergences)), float(np.mean(agreements)),
        tolerance.rows, tolerance.kl,
    )  # fmt: skip


def check_first_token(logits_V: Any, token_ids: tuple[int, ...], logprobs: tuple[float, ...]) -> None:
    """Compare the first token's distribution with the prefill side's likeliest tokens.

    One row too many or too few, or rows of another prompt, give another distribution; noise between engines does not
    move a likely token's log probability by a nat.

    Raises:
        ProtocolError: a token that the prefill side finds likely is unlikely here.
    """
    from sparkray.handoff.compare import log_softmax

    here = log_softmax(np.asarray(logits_V, np.float32))
    for token, there in zip(token_ids, logprobs, strict=True):
        # Tokens below one in twenty move freely with quantised weights.
        if there > np.log(0.05) and abs(float(here[token]) - there) > 1.5:
            raise ProtocolError(
                Reason.CANARY,
                f"token {token} has log probability {there:.2f} on the prefill side and {float(here[token]):.2f} here.",
            )
