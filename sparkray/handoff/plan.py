"""What a route costs: time to first token and total time from measured rates.

    prefill ends at          P = u_p / R_p                       u_p: prompt tokens that prefill lacks
    bytes are across at      max(P, bytes / B) + last frame / B  rows leave while later ones are computed
    first token at           that + RTT + import + one step of decode
    each further token       one step of decode

A transfer hides behind prefill where R_p * bytes_per_token <= B, whatever the length of the prompt. (EXO's rule,
s > q P / (16 K B), counts attention only and calls for 10k tokens where their own run of 8k was hidden.)
"""

from __future__ import annotations

from dataclasses import dataclass

from sparkray.config.handoff import KvDtypeName, LinkRates, MachineRates, ModelShape, RouteName
from sparkray.errors import InputError
from sparkray.handoff.fingerprint import ModelIdentity

GIGABIT = 1e9 / 8
# What TCP over Ethernet leaves of the line rate with jumbo frames.
ETHERNET_SHARE = 0.94
CODEC_BITS: dict[str, float] = {"raw": 16, "lossless": 12, "int8": 8.25, "k4v4": 4.75}


@dataclass(frozen=True, slots=True)
class RouteTimes:
    """Predicted times of one route, seconds.

    Attributes:
        route: the route.
        prefill_seconds: until all rows exist.
        exposed_seconds: from then until the decode side can take its first step.
        first_token_seconds: until the first token.
        total_seconds: until the last one.
        hidden_share: share of the transfer that runs while prefill still does; 1 where there is none.
        kv_bytes: bytes that cross the link.
    """

    route: RouteName
    prefill_seconds: float
    exposed_seconds: float
    first_token_seconds: float
    total_seconds: float
    hidden_share: float = 1.0
    kv_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Work:
    """One request.

    Attributes:
        prompt_tokens: of the whole prompt.
        output_tokens: of the answer.
        cached_prefill: prompt tokens whose rows the prefill side has.
        cached_decode: prompt tokens whose rows the decode side has.
        prefill_queue_seconds: before the prefill side begins.
        decode_queue_seconds: before the decode side can.
    """

    prompt_tokens: int
    output_tokens: int
    cached_prefill: int = 0
    cached_decode: int = 0
    prefill_queue_seconds: float = 0.0
    decode_queue_seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise InputError(
                f"a request of {self.prompt_tokens} prompt and {self.output_tokens} output tokens was given, and 1 or"
                " more of each is expected."
            )


def hides(shape: ModelShape, prefill_tokens_per_second: float, link: LinkRates, coded_share: float = 1.0) -> bool:
    """Whether bytes appear no faster than they leave."""
    return prefill_tokens_per_second * shape.kv_bytes_per_token * coded_share <= link.bytes_per_second


def handoff_times(
    shape: ModelShape,
    prefill: MachineRates,
    decode: MachineRates,
    link: LinkRates,
    work: Work,
    coded_share: float = 1.0,
) -> RouteTimes:
    """Prefill there, decode here. The decode side computes the last prompt token's row itself."""
    ready = work.prefill_queue_seconds + (work.prompt_tokens - work.cached_prefill) / prefill.prefill_tokens_per_second
    rows = max(0, work.prompt_tokens - 1 - work.cached_decode)
    kv_bytes = rows * shape.kv_bytes_per_token * coded_share
    wire = kv_bytes / link.bytes_per_second
    last_frame = min(link.last_frame_bytes, kv_bytes) / link.bytes_per_second
    # Rows that were cached on the prefill side can leave at once; all others follow prefill.
    begun = work.prefill_queue_seconds
    across = max(ready + last_frame, begun + wire)
    exposed = across - ready
    step = 1 / decode.decode_tokens_per_second
    arrives = max(across + link.rtt_seconds + link.import_seconds, work.decode_queue_seconds)
    return RouteTimes(
        "handoff",
        ready,
        exposed + link.rtt_seconds + link.import_seconds,
        arrives + step,
        arrives + work.output_tokens * step,
        1.0 if wire == 0 else min(1.0, max(0.0, (wire - exposed) / wire)),
        kv_bytes,
    )


def alone_times(route: RouteName, machine: MachineRates, work: Work) -> RouteTimes:
    """Both phases on one machine: `prefill_node` or `decode_node`."""
    at_prefill = route == "prefill_node"
    cached = work.cached_prefill if at_prefill else work.cached_decode
    queued = work.prefill_queue_seconds if at_prefill else work.decode_queue_seconds
    ready = queued + max(1, work.prompt_tokens - cached) / machine.prefill_tokens_per_second
    step = 1 / machine.decode_tokens_per_second
    # Prefill's last step gives the first token.
    return RouteTimes(route, ready, 0.0, ready, ready + (work.output_tokens - 1) * step)


def ethernet(gigabits_per_second: float, *, rtt_seconds: float = 0.0006, last_frame_bytes: float = 0.0) -> LinkRates:
    """A link by its line rate."""
    return LinkRates(
        bytes_per_second=gigabits_per_second * GIGABIT * ETHERNET_SHARE,
        rtt_seconds=rtt_seconds,
        last_frame_bytes=last_frame_bytes,
    )


# EXO's run, blog.exolabs.net/nvidia-dgx-spark: Llama-3.1-8B in FP16, 8,192 prompt tokens, 32 output tokens, 10GbE.
LLAMA_8B = ModelShape(name="Llama-3.1-8B", num_layers=32, num_kv_heads=8, head_dim=128, active_params=8.03e9)
LLAMA_70B = ModelShape(name="Llama-3.3-70B", num_layers=80, num_kv_heads=8, head_dim=128, active_params=70.6e9)
QWEN3_32B = ModelShape(name="Qwen3-32B", num_layers=64, num_kv_heads=8, head_dim=128, active_params=32.8e9)
QWEN3_CODER_30B = ModelShape(
    name="Qwen3-Coder-30B-A3B", num_layers=48, num_kv_heads=4, head_dim=128, active_params=3.3e9
)
MODELS = (LLAMA_8B, LLAMA_70B, QWEN3_32B, QWEN3_CODER_30B)
EXO_WORK = Work(prompt_tokens=8192, output_tokens=32)
EXO_SPARK = MachineRates(
    name="DGX Spark", prefill_tokens_per_second=8192 / 1.47, decode_tokens_per_second=32 / 2.87,
    source="EXO, measured with Llama-3.1-8B FP16",
)  # fmt: skip
EXO_MAC = MachineRates(
    name="M3 Ultra", prefill_tokens_per_second=8192 / 5.57, decode_tokens_per_second=32 / 0.85,
    source="EXO, measured with Llama-3.1-8B FP16",
)  # fmt: skip
# Seconds: prefill, generation, total, as published.
EXO_TABLE = {
    "prefill_node": (1.47, 2.87, 4.34),
    "decode_node": (5.57, 0.85, 6.42),
    "handoff": (1.47, 0.85, 2.32),
}


def scaled_rates(base: MachineRates, measured_with: ModelShape, shape: ModelShape) -> MachineRates:
    """Rates of another model on the same machine, by size.

    Prefill is bound by arithmetic: inverse to active parameters. Decode is bound by memory: inverse to the bytes of
    active weights. Both leave out attention and launch costs, so this is a first guess where nothing was measured.
    """
    compute = measured_with.active_params / shape.active_params
    memory = compute * measured_with.weight_bits / shape.weight_bits
    return MachineRates(
        name=base.name,
        prefill_tokens_per_second=base.prefill_tokens_per_second * compute,
        decode_tokens_per_second=base.decode_tokens_per_second * memory,
        source=f"scaled by size from {base.source}",
    )


def shape_of_identity(identity: ModelIdentity, dtype: KvDtypeName) -> ModelShape:
    """The part of a model's shape that transfers depend on; its rates are measured, so parameters are not needed."""
    return ModelShape(
        name=identity.architecture,
        num_layers=identity.num_layers,
        num_kv_heads=identity.num_kv_heads,
        head_dim=identity.key_dim,
        active_params=1,
        kv_bits=32 if dtype == "float32" else 16,
    )
