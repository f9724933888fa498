"""Which codec the next transfer offers first, from what earlier ones took."""

from __future__ import annotations

from threading import Lock

from sparkray.config.handoff import CodecName
from sparkray.handoff.codecs import CodecRates, choose_codec, measure_codecs
from sparkray.handoff.policy import LearnedRate
from sparkray.handoff.rows import KvGeometry
from sparkray.handoff.sender import SendReport

# Until a transfer was seen, the link is taken for 10 Gbit/s Ethernet and prefill for something that fits it.
_FIRST_LINK_BYTES_PER_SECOND = 1.175e9
_FIRST_PREFILL_TOKENS_PER_SECOND = 1000.0
# Shorter than this, a transfer says more of latencies than of rates.
_MIN_BYTES = 1 << 20


class CodecChoice:
    """Learns link and prefill rates, and orders codecs by them.

    Args:
        geometry: of the rows.
        codec: "auto", or the one that is always used.
    """

    def __init__(self, geometry: KvGeometry, codec: CodecName | str) -> None:
        self._geometry = geometry
        self._fixed = codec
        self._link = LearnedRate(_FIRST_LINK_BYTES_PER_SECOND)
        self._prefill = LearnedRate(_FIRST_PREFILL_TOKENS_PER_SECOND)
        self._lock = Lock()
        self._shares, self._speeds = measure_codecs(geometry) if codec == "auto" else ({}, {})

    def offer(self, prompt_tokens: int) -> tuple[CodecName, ...]:
        """Codecs for HELLO, best first."""
        if self._fixed != "auto":
            return (self._fixed,)  # type: ignore[return-value]
        with self._lock:
            num_bytes = prompt_tokens * self._geometry.row_bytes
            rates = CodecRates(
                self._prefill.rate(prompt_tokens), self._link.rate(num_bytes), self._shares, self._speeds
            )
        best = choose_codec(self._geometry, rates, ("raw", "lossless", "int8"))
        return (best,) if best == "raw" else (best, "raw")

    def learn(self, report: SendReport, prefill_tokens: int, prefill_seconds: float, wire_seconds: float) -> None:
        """Take the rates of a transfer that ended well."""
        with self._lock:
            self._prefill.observe(prefill_tokens, prefill_seconds)
            if report.payload_bytes >= _MIN_BYTES:
                self._link.observe(report.payload_bytes, wire_seconds)
