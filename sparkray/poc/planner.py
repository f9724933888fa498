"""A cost model of a preset on a machine, and the search for the big one.

A start is drawing the pool (one sequential stream of normals), copying it and a fixed cost; a nonce is its floating
point operations at the share of peak that the engine reaches, or its input's preparation where that is slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from pydantic import ValidationError

from sparkray.config.poc import R_TARGET_DEFAULT, ModelParams, WeightsConfig
from sparkray.poc.groups import get_min_group_vram
from sparkray.poc.statistics import valid_share
from sparkray.poc.weights import pool_numel


@dataclass(frozen=True, slots=True)
class Machine:
    """What the cost model knows of one GPU group and its host.

    Attributes:
        peak_tflops: dense float16 with float32 accumulation (float32 on a CPU).
        utilisation: share of the peak that the engine reaches.
        memory_gib: of the group.
        normals_per_second: normals that one thread draws; a pool is one stream.
        prep_threads: threads that make inputs.
        copy_gb_per_second: from host to device.
        fixed_start_seconds: process, device context, tables.
    """

    name: str
    peak_tflops: float
    memory_gib: float
    utilisation: float = 0.6
    normals_per_second: float = 60e6
    prep_threads: int = 8
    copy_gb_per_second: float = 10.0
    fixed_start_seconds: float = 6.0


# Peaks are of vendor data sheets; the one of GB10 is derived from its sparse float4 figure and not measured.
MACHINES = (
    Machine("GB10", 125.0, 119.0, normals_per_second=60e6, prep_threads=16),
    Machine("H100", 989.0, 79.0, normals_per_second=70e6, prep_threads=12),
    Machine("H200", 989.0, 139.0, normals_per_second=70e6, prep_threads=12),
    Machine("A100", 312.0, 79.0, normals_per_second=60e6, prep_threads=12),
    Machine("RTX 4090", 165.0, 23.5, normals_per_second=80e6),
)


def peak_tflops(device_names: Iterable[str]) -> float | None:
    """Peak of so many devices together; None where there is none or one of them is not known."""
    peaks = [
        next((each.peak_tflops for each in MACHINES if _letters(each.name) in _letters(name)), None)
        for name in device_names
    ]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).upper()


@dataclass(frozen=True, slots=True)
class Prediction:
    """One preset on one machine.

    Attributes:
        nominal_gb: all elements in float16, in GB of 1e9 bytes.
        distinct_gb: the part of them that is drawn; the rest repeats it.
        needed_gib: memory of the engine with a batch of 32.
        start_seconds: until the first nonce can be computed.
        raw_per_hour: nonces computed.
        valid_per_hour: nonces below the target.
    """

    machine: str
    params: ModelParams
    weights: WeightsConfig
    nominal_gb: float
    distinct_gb: float
    needed_gib: float
    start_seconds: float
    raw_per_hour: float
    valid_per_hour: float
    fits: bool


def predict(
    params: ModelParams, weights: WeightsConfig, machine: Machine, r_target: float = R_TARGET_DEFAULT
) -> Prediction:
    """The cost model."""
    drawn = params.num_params if weights.pool_fraction is None else pool_numel(params, weights.pool_fraction)
    compute_seconds = params.flop_per_nonce / (machine.peak_tflops * 1e12 * machine.utilisation)
    prep_seconds = (params.seq_len * params.dim + params.vocab_size) / machine.normals_per_second
    raw = 3600.0 / max(compute_seconds, prep_seconds / machine.prep_threads)
    needed = get_min_group_vram(params, weights)
    return Prediction(
        machine=machine.name,
        params=params,
        weights=weights,
        nominal_gb=2e-9 * params.num_params,
        distinct_gb=2e-9 * drawn,
        needed_gib=needed,
        start_seconds=(
            machine.fixed_start_seconds + drawn / machine.normals_per_second + 2e-9 * drawn / machine.copy_gb_per_second
        ),
        raw_per_hour=raw,
        valid_per_hour=raw * valid_share(r_target, params.vocab_size),
        fits=needed <= machine.memory_gib,
    )


@dataclass(frozen=True, slots=True)
class Goal:
    """What the big preset must be on the machine it is searched for; margins are kept on both rates."""

    min_gb: float = 30.0
    max_gb: float = 40.0
    max_start_seconds: float = 60.0
    min_valid_per_hour: float = 500.0
    margin: float = 1.2


def search(machine: Machine, goal: Goal | None = None, r_target: float = R_TARGET_DEFAULT) -> list[Prediction]:
    """Presets that meet the goal, the most distinct bytes first, then the most valid nonces.

    Distinct bytes are what a prover cannot do without; everything else being equal a faster nonce is better.
    """
    goal = goal or Goal()
    found = []
    for params, weights in _candidates():
        if not goal.min_gb <= 2e-9 * params.num_params <= goal.max_gb:
            continue
        prediction = predict(params, weights, machine, r_target)
        if (
            prediction.fits
            and prediction.start_seconds * goal.margin <= goal.max_start_seconds
            and prediction.valid_per_hour >= goal.min_valid_per_hour * goal.margin
        ):
            found.append(prediction)
    return sorted(found, key=lambda each: (-round(each.distinct_gb, 2), -each.valid_per_hour))


def _candidates() -> Iterator[tuple[ModelParams, WeightsConfig]]:
    shapes = product((1024, 1536, 2048, 3072, 4096), (24, 32, 40, 48, 64), (4.0, 6.0, 10.0), (64, 128, 256))
    for (dim, n_layers, multiplier, seq_len), fraction in product(shapes, (0.05, 0.075, 0.1, 0.125, 0.15)):
        try:
            params = ModelParams(
                dim=dim, n_layers=n_layers, n_heads=dim // 64, n_kv_heads=dim // 64, vocab_size=8192,
                ffn_dim_multiplier=multiplier, multiple_of=1024, rope_theta=10_000.0, seq_len=seq_len,
            )  # fmt: skip
        except ValidationError:
            continue
        yield params, WeightsConfig(pool_fraction=fraction)
