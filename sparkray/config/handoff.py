"""Settings of the handoff: limits of the wire, the two sides, what a route costs, and the machines that are known.

Sizes are bytes, times seconds, rates per second. Nothing here knows an engine.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from sparkray.config.base import Settings

CodecName = Literal["raw", "int8", "k4v4", "lossless"]
KvDtypeName = Literal["float32", "float16", "bfloat16"]
EngineName = Literal["mlx", "llamacpp"]
RouteName = Literal["handoff", "prefill_node", "decode_node"]

MIB = 1 << 20


class WireLimits(Settings):
    """What a peer may make this process hold; everything above is refused before memory is taken."""

    max_frame_bytes: int = Field(64 * MIB, ge=1024, le=1 << 31, description="Largest payload of a KV frame.")
    max_control_bytes: int = Field(16 * MIB, ge=1024, le=256 * MIB, description="Largest JSON payload.")
    max_prompt_tokens: int = Field(1 << 20, ge=1, description="Longest prompt.")
    max_layers: int = Field(512, ge=1, le=65_535, description="Most layers.")
    max_row_bytes: int = Field(4 * MIB, ge=1, description="Most bytes of one token's keys and values in one layer.")
    max_kv_bytes: int = Field(64 << 30, ge=1, description="Most bytes of one request's keys and values.")
    max_pending_bytes: int = Field(1 << 30, ge=1024, description="Most bytes held that cannot be given on yet.")
    max_frames: int = Field(1 << 20, ge=1, description="Most KV frames of one request.")


class LinkConfig(Settings):
    """One connection between the two sides."""

    connect_timeout_seconds: float = Field(5.0, gt=0, le=600, description="Time for TCP and TLS to come up.")
    stall_timeout_seconds: float = Field(20.0, gt=0, le=3600, description="Longest silence of the peer.")
    total_timeout_seconds: float = Field(600.0, gt=0, le=86_400, description="Longest life of one transfer.")
    retries: int = Field(5, ge=0, le=100, description="Times that a broken connection is made again.")
    retry_delay_seconds: float = Field(0.5, ge=0, le=60, description="First pause before that; it doubles.")
    socket_buffer_bytes: int = Field(4 * MIB, ge=4096, le=256 * MIB, description="Send and receive buffer.")
    congestion_control: Literal["cubic", "reno", "bbr", "system"] = Field(
        "cubic", description="Linux: how the sending side finds its rate; bbr suits lossy lines, and costs a core."
    )
    credit_bytes: int = Field(64 * MIB, ge=4096, description="Bytes that may be on the way unacknowledged.")


class TlsConfig(Settings):
    """Certificates of one side. Both sides show one, and each knows the other's authority."""

    certificate: str = Field(description="PEM file with this side's certificate.")
    private_key: str = Field(description="PEM file with its key.")
    authority: str = Field(description="PEM file with the certificate that signs, or is, the peer's.")


class DecodeConfig(Settings):
    """The decode side: one engine that accepts rows and continues."""

    engine: EngineName = Field("mlx", description="`mlx` or `llamacpp`.")
    model: str = Field("embedded", description="`embedded`, a directory, or a GGUF file.")
    lineage: str | None = Field(None, description="Name of the base checkpoint, where weights cannot tell it.")
    dtype: KvDtypeName = Field("float32", description="Type of weights and cache where the engine leaves a choice.")
    kv_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = Field("f32", description="llama.cpp: type of the cache.")
    context_tokens: int = Field(4096, ge=16, le=1 << 20, description="Longest sequence, prompt and answer.")
    max_sequences: int = Field(8, ge=1, le=256, description="Conversations whose rows are kept.")
    num_threads: int = Field(0, ge=0, le=1024, description="Threads of the engine; 0: it decides.")
    host: str = Field("127.0.0.1", description="Address to listen at.")
    port: int = Field(0, ge=0, le=65_535, description="Port to listen at; 0: any free one.")
    max_connections: int = Field(64, ge=1, le=65_536, description="Connections held at once; further ones are refused.")
    secret_file: str | None = Field(None, description="File with the shared secret that signs tickets.")
    tls: TlsConfig | None = Field(None, description="Certificates; needed beyond loopback unless insecure is set.")
    insecure: bool = Field(False, description="Listen beyond loopback without TLS.")
    require_pairing: bool = Field(True, description="Refuse rows of a prefill side whose canary has not passed.")
    limits: WireLimits = Field(WireLimits(), description="What a peer may make this process hold.")
    link: LinkConfig = Field(LinkConfig(), description="Time limits and buffers of a connection.")

    @model_validator(mode="after")
    def _beyond_loopback_is_safe(self) -> Self:
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        if not loopback and self.tls is None and not self.insecure:
            raise ValueError(
                f"host={self.host!r} is reachable from other machines, so tls is needed; insecure=true does without"
            )
        return self


class PrefillConfig(Settings):
    """The prefill side: vLLM with the connector."""

    model: str = Field("embedded", description="`embedded`, a directory, or a hub id.")
    dtype: KvDtypeName = Field("float32", description="Type of weights and cache.")
    max_model_len: int = Field(4096, ge=16, description="Longest prompt.")
    chunk_tokens: int = Field(512, ge=16, description="Tokens of one step; rows leave layer by layer inside it.")
    block_size: int | None = Field(None, ge=1, description="Tokens of a KV block; empty: vLLM's own.")
    prefix_caching: bool = Field(True, description="Keep blocks of earlier prompts.")
    codec: CodecName | Literal["auto"] = Field("auto", description="`auto` chooses between raw and int8 by rates.")
    tls: TlsConfig | None = Field(None, description="Certificates shown to decode peers; empty: plain TCP.")
    link: LinkConfig = Field(LinkConfig(), description="Time limits and buffers of a connection.")
    max_streams: int = Field(64, ge=1, le=4096, description="Transfers at once; further requests prefill unsent.")


class RouteConfig(Settings):
    """When a request is handed off."""

    min_gain_seconds: float = Field(0.05, ge=0, description="A handoff must be better by this much.")
    min_gain_share: float = Field(0.1, ge=0, lt=1, description="And by this share of the best other route.")
    max_kv_bytes: int = Field(64 << 30, ge=1, description="Larger transfers stay where the prompt is read.")
    hysteresis_share: float = Field(0.1, ge=0, lt=1, description="A conversation leaves its route only for more.")


class ModelShape(Settings):
    """What the cost of a model depends on."""

    name: str = Field(description="Name in tables.")
    num_layers: int = Field(ge=1, description="Layers with keys and values.")
    num_kv_heads: int = Field(ge=1, description="Key and value heads.")
    head_dim: int = Field(ge=1, description="Width of a head.")
    active_params: float = Field(gt=0, description="Parameters that one token uses.")
    weight_bits: float = Field(16, gt=0, le=32, description="Bits of a weight as decode reads it.")
    kv_bits: int = Field(16, ge=2, le=32, description="Bits of a key or value as prefill makes it.")

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bits / 8


class MachineRates(Settings):
    """What a machine was measured, or is said, to do with one model."""

    name: str = Field(description="Name in tables.")
    prefill_tokens_per_second: float = Field(gt=0, description="Prompt tokens a second.")
    decode_tokens_per_second: float = Field(gt=0, description="Answer tokens a second, one request.")
    source: str = Field(description="Where the two numbers come from.")


class LinkRates(Settings):
    """What a link carries."""

    bytes_per_second: float = Field(gt=0, description="Payload rate, protocol overhead already taken off.")
    rtt_seconds: float = Field(0.0006, ge=0, description="Round trip.")
    import_seconds: float = Field(0.0, ge=0, description="From the last byte to rows that the engine can use.")
    last_frame_bytes: float = Field(0.0, ge=0, description="Bytes that can leave only after prefill has ended.")


class HandoffConfig(Settings):
    """One coordinator: its prefill engine, its decode peers, and when it hands off."""

    peers: list[str] = Field(min_length=1, max_length=256, description="Decode peers, HOST:PORT each.")
    secret_file: str = Field(description="File with the secret that is shared with the peers.")
    model_id: str = Field("sparkray", min_length=1, description="The name that clients use.")
    prefill: PrefillConfig = Field(PrefillConfig(), description="The prefill engine.")
    route: RouteConfig = Field(RouteConfig(), description="When a request is handed off.")
    force_route: RouteName | None = Field(None, description="A route that is always taken while it is open.")
    prefill_rates: MachineRates = Field(
        MachineRates(name="prefill", prefill_tokens_per_second=3500, decode_tokens_per_second=11, source="first guess"),
        description="First guess of the prefill side's rates; measured ones replace it.",
    )
    decode_rates: MachineRates = Field(
        MachineRates(name="decode", prefill_tokens_per_second=1400, decode_tokens_per_second=38, source="first guess"),
        description="First guess of a decode peer's rates; measured ones replace it.",
    )
    link_gbit: float = Field(10.0, gt=0, description="Line rate of the link to the peers.")
    decode_context_tokens: int = Field(4096, ge=16, description="Longest sequence that the peers take.")
    limits: WireLimits = Field(WireLimits(), description="What a peer may make this process hold.")
    max_requests: int = Field(64, ge=1, le=4096, description="Requests at once.")
    kv_cache_gib: int = Field(1, ge=1, description="KV cache of a CPU engine, in GiB.")
    num_cpus: float = Field(1, ge=0, description="Ray's logical CPUs of the replica.")
    resources: dict[str, float] = Field(default_factory=dict, description="Ray's resources that place the replica.")
