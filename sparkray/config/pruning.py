"""Settings of expert pruning: what is watched, what is cut, and what a cut model must still do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sparkray.config.base import Settings

CriterionName = Literal[
    "reap",
    "reap_l2",
    "contribution",
    "frequency",
    "ean_sum",
    "ean_mean",
    "man",
    "msan",
    "weighted_ean_sum",
    "weighted_ean_sum_l2",
    "weighted_frequency_sum",
    "max_activations",
    "random",
]
GateSource = Literal["model", "upstream"]
PlacementName = Literal["auto", "resident", "layers", "streaming"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
LongTextRule = Literal["refuse", "truncate", "split"]
EngineName = Literal["transformers", "vllm"]
ProtectRule = Literal["none", "super", "outliers"]

_SIZES = ("ratio", "num_experts", "target_gb")


class CalibrationConfig(Settings):
    """How a calibration set is read and cut into sequences."""

    max_sequence_tokens: int = Field(2048, ge=2, le=1_048_576, description="Longest sequence that is watched.")
    long_text: LongTextRule = Field("refuse", description="What happens to a text longer than that.")
    num_samples: int | None = Field(None, ge=1, description="Rows drawn from each file or dataset; unset: all.")
    seed: int = Field(42, ge=0, description="Seed of the draw, and part of the directory's name.")


class ObserveConfig(Settings):
    """How the forward passes over the calibration set are run."""

    gate_source: GateSource = Field("model", description="`upstream` takes softmax gates of the raw router logits.")
    renormalize_upstream: bool | None = Field(
        None, description="With upstream gates: renormalise over the top-k; unset follows config.norm_topk_prob."
    )
    dtype: DtypeName = Field("auto", description="Type of the forward; `auto` is the checkpoint's own.")
    placement: PlacementName = Field(
        "auto", description="`streaming` holds one layer in memory; `layers` spreads them over the nodes of a cluster."
    )
    resident_share: float = Field(
        0.7, gt=0, le=1, description="Share of available memory that a resident model may take under `auto`."
    )
    micro_batch_sequences: int = Field(4, ge=1, le=4096, description="Sequences in one forward pass.")
    shard_sequences: int = Field(16, ge=1, le=1_048_576, description="Sequences in one shard of partial sums.")
    streamed_hidden_gb: float = Field(
        2.0, gt=0, description="Hidden states held while streaming, in GB; more means fewer reads of the checkpoint."
    )
    device: str = Field("cpu", description="torch device of the forward.")


class ActorConfig(Settings):
    """The Ray actors of an observation, one a node."""

    num_cpus: float = Field(1.0, gt=0, description="CPUs that an actor reserves; also its threads.")
    num_gpus: float | None = Field(None, ge=0, description="GPUs that an actor reserves; unset: 1 on cuda.")
    max_attempts: int = Field(3, ge=1, le=100, description="Times that a shard is tried when actors die under it.")
    start_timeout_seconds: float = Field(300.0, gt=0, description="Limit for an actor to answer at all.")
    shard_timeout_seconds: float = Field(7200.0, gt=0, description="Limit for the next shard to be finished.")


class PlanConfig(Settings):
    """What is cut. At most one of ratio, num_experts and target_gb is given; without any, a quarter is cut."""

    criterion: CriterionName = Field("reap", description="Score of an expert; the lowest are cut.")
    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the experts of a layer to cut.")
    num_experts: int | None = Field(None, ge=1, description="Experts of a layer to keep.")
    target_gb: float | None = Field(None, gt=0, description="Size of the checkpoint to reach, in GB of 1e9 bytes.")
    protect: ProtectRule = Field("none", description="Experts with outlying activations that are never cut.")
    multiple_of: int = Field(1, ge=1, description="Kept experts are a multiple of this (expert parallelism).")
    seed: int = Field(42, ge=0, description="Seed of `random` and of the stability estimate.")

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = [name for name in _SIZES if values.get(name) is not None]
        if len(given) > 1:
            raise ValueError(f"at most one of ratio, num_experts and target_gb is expected, and {given} were given")
        return values if given else {**values, "ratio": 0.25}


class ValidateConfig(Settings):
    """Bounds that a pruned checkpoint must keep; an unset bound is reported and not enforced."""

    max_perplexity_ratio: float | None = Field(None, gt=0, description="Perplexity after over before.")
    max_token_kl: float | None = Field(None, ge=0, description="Mean KL(before || after) a token, in nats.")
    min_top1_agreement: float | None = Field(None, ge=0, le=1, description="Share of tokens with the same argmax.")
    max_sequences: int = Field(64, ge=1, le=65_536, description="Sequences of the set that are compared.")
    dtype: DtypeName = Field("auto", description="Type of both forwards.")
    micro_batch_sequences: int = Field(4, ge=1, le=4096, description="Sequences in one forward pass.")
    device: str = Field("cpu", description="torch device of both forwards.")
    engine: EngineName = Field("transformers", description="What computes the distributions.")
    vllm_top_logprobs: int = Field(
        64, ge=1, le=262_144, description="Likeliest tokens a place that vLLM gives; the KL is exact where it is all."
    )
    vllm_kv_cache_gib: float = Field(1.0, gt=0, description="KV cache of vLLM's CPU engine, in GiB.")
    vllm_gpu_memory: float = Field(0.8, gt=0, le=0.95, description="Share of the GPU's memory that vLLM takes.")


class PruneConfig(Settings):
    """One prune from checkpoint to checked checkpoint."""

    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig, description="The calibration set.")
    observe: ObserveConfig = Field(default_factory=ObserveConfig, description="The forward passes.")
    actors: ActorConfig = Field(default_factory=ActorConfig, description="The same, spread over a Ray cluster.")
    plan: PlanConfig = Field(default_factory=PlanConfig, description="What is cut.")
    check: ValidateConfig = Field(default_factory=ValidateConfig, description="What must still hold.")


class PruneJobConfig(PruneConfig):
    """One run of `jobs/prune_experts.py`: a prune and its place. The sizes and the criterion win over `plan`'s."""

    model: str = Field(min_length=1, description="Model directory, at the same path on every node.")
    data: str = Field(min_length=1, description="Calibration set, as `sparkray prune experts --data` takes it.")
    work: str | None = Field(None, description="Folder of partial sums and results; artifacts/MODEL/DATA when unset.")
    out: str | None = Field(None, description="Directory of the pruned checkpoint.")
    ratio: float | None = Field(None, gt=0, lt=1, description="Share of the experts of a layer to cut.")
    num_experts: int | None = Field(None, ge=1, description="Experts of a layer to keep.")
    target_gb: float | None = Field(None, gt=0, description="Size of the checkpoint to reach, in GB of 1e9 bytes.")
    criterion: CriterionName | None = Field(None, description="Score of an expert; the lowest are cut.")
    compare: bool = Field(True, description="Compare both models at the end.")
    on_ray: bool = Field(True, description="One actor a node of the cluster; else this process alone.")

    @model_validator(mode="before")
    @classmethod
    def _flags_into_plan(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        plan = dict(values.get("plan") or {})
        given = {name: values[name] for name in _SIZES if values.get(name) is not None}
        if given:
            plan = {name: value for name, value in plan.items() if name not in _SIZES} | given
        if values.get("criterion") is not None:
            plan["criterion"] = values["criterion"]
        return {**values, "plan": plan}
