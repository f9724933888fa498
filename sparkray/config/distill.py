"""Settings of distillation: data, teacher, client, cache, store, loss, students and training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from sparkray.config.base import Settings

TeacherKind = Literal["transformers", "vllm_local", "vllm_remote", "api"]
ScoringMode = Literal["prompt_logprobs", "echo", "completion"]
TargetKind = Literal["sampled_tail", "tail_bucket", "renormalised"]
Divergence = Literal["forward_kl", "reverse_kl", "skewed_forward_kl", "skewed_reverse_kl", "jensen_shannon"]
StudentKind = Literal["causal", "latent"]


class PackConfig(Settings):
    """How text becomes sequences of equal length."""

    sequence_tokens: int = Field(512, ge=8, le=1_048_576, description="Tokens of one packed sequence.")
    chunk_tokens: int = Field(4, ge=1, le=64, description="Tokens of a latent chunk; divides sequence_tokens.")
    validation_share: float = Field(0.1, ge=0, lt=1, description="Share of the documents that is held out.")
    max_sequences: int | None = Field(None, ge=1, description="Most training sequences; all of them when unset.")
    seed: int = Field(0, ge=0, description="Seed of the split.")
    tokenizer: str | None = Field(
        None, description="Folder of the student's tokenizer; the teacher's when unset. Another one needs alignment."
    )

    @model_validator(mode="after")
    def _chunks_divide(self) -> Self:
        if self.sequence_tokens % self.chunk_tokens:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must divide sequence_tokens={self.sequence_tokens}")
        return self


class TeacherConfig(Settings):
    """Which model teaches, where it runs, and how it is asked."""

    kind: TeacherKind = Field("transformers", description="Where the teacher runs.")
    model: str = Field("embedded", description="Local folder, hub id, `embedded`, or the name that a server gives it.")
    tokenizer: str | None = Field(None, description="Folder of the teacher's tokenizer; the model's own when unset.")
    revision: str | None = Field(None, description="Revision of the model; part of every key.")
    quantization: str | None = Field(None, description="Quantisation of the weights; part of every key.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the forward.")
    base_url: str | None = Field(None, description="`http(s)://host:port/v1` of a served teacher.")
    api_key_env: str = Field("SPARKRAY_TEACHER_API_KEY", description="Environment variable that holds the API key.")
    mode: ScoringMode = Field(
        "prompt_logprobs",
        description="`prompt_logprobs` and `echo` score the given tokens; `completion` can only continue them.",
    )
    max_model_tokens: int = Field(
        16_384, ge=8, description="Context of the teacher; longer texts are cut with overlap."
    )
    overlap_tokens: int = Field(1_024, ge=0, description="Context that a window of a longer text sees again.")
    gpu_memory_utilization: float = Field(0.80, gt=0, le=1, description="Share of the memory for an in-process vLLM.")
    device: str = Field("cpu", description="torch device of an in-process transformers teacher.")

    @model_validator(mode="after")
    def _served_teachers_have_an_address(self) -> Self:
        served = self.kind in ("vllm_remote", "api")
        if served != (self.base_url is not None):
            raise ValueError(f"kind={self.kind!r} {'needs' if served else 'takes no'} base_url")
        if self.overlap_tokens >= self.max_model_tokens:
            raise ValueError(
                f"overlap_tokens={self.overlap_tokens} must be below max_model_tokens={self.max_model_tokens}"
            )
        return self


class ClientConfig(Settings):
    """How requests to a served teacher are bounded, repeated and counted."""

    max_in_flight: int = Field(8, ge=1, le=256, description="Most requests at the same time.")
    top_logprobs: int = Field(20, ge=1, le=1024, description="Log-probabilities asked for at a position.")
    reduced_top_logprobs: int = Field(10, ge=1, description="What is asked for after the host said 429.")
    successes_to_recover: int = Field(10, ge=1, description="Answers in a row after which the full number returns.")
    request_timeout_seconds: float = Field(120.0, gt=0, description="Time limit of one attempt.")
    deadline_seconds: float = Field(600.0, gt=0, description="Time limit of all attempts of one request.")
    backoff_seconds: float = Field(0.5, gt=0, description="First pause; doubles with every attempt.")
    max_backoff_seconds: float = Field(32.0, gt=0, description="Longest pause, unless Retry-After says more.")
    prefetch_depth: int = Field(16, ge=1, le=4096, description="Requests that run ahead of the training loop.")

    @model_validator(mode="after")
    def _reduced_is_smaller(self) -> Self:
        if self.reduced_top_logprobs > self.top_logprobs:
            raise ValueError(
                f"reduced_top_logprobs={self.reduced_top_logprobs} must not exceed top_logprobs={self.top_logprobs}"
            )
        return self


class CacheConfig(Settings):
    """The SQLite file that keeps answers of a teacher."""

    path: Path = Field(Path("cache/teacher_scores.sqlite"), description="The file; its folder is made.")
    read_only: bool = Field(False, description="Never write (`--kd-cache-ro`).")
    ttl_seconds: float = Field(30 * 86_400.0, gt=0, description="Age above which a row is no answer any more.")
    max_rows: int = Field(1_000_000, ge=1, description="Rows kept; the oldest go first.")
    write_batch_rows: int = Field(64, ge=1, le=65_536, description="Rows of one transaction.")
    busy_timeout_seconds: float = Field(10.0, gt=0, description="How long another process may hold the file.")


class StoreConfig(Settings):
    """The Parquet store of a teacher's rows for a packed corpus."""

    top_logprobs: int = Field(20, ge=1, le=1024, description="Entries of the exact head.")
    tail_draws: int = Field(6, ge=0, le=256, description="Tokens drawn from the rest, where full logits are at hand.")
    temperature: float = Field(1.0, gt=0, le=100, description="Temperature at which head and tail are taken.")
    shard_sequences: int = Field(32, ge=1, le=65_536, description="Sequences in one file.")
    seed: int = Field(0, ge=0, description="Seed of the draws.")


class LossConfig(Settings):
    """What the student is pulled towards."""

    target: TargetKind = Field("sampled_tail", description="What stands for the teacher's tail.")
    divergence: Divergence = Field("forward_kl", description="Distance between teacher and student.")
    temperature: float = Field(1.0, gt=0, le=100, description="Temperature of both; the loss is scaled by its square.")
    skew: float = Field(0.1, gt=0, lt=1, description="Share of the other model in the skewed divergences.")
    beta: float = Field(0.5, gt=0, lt=1, description="Share of the teacher in the Jensen-Shannon mixture.")
    ce_weight: float = Field(0.5, ge=0, description="Weight of the cross entropy on the data.")
    kd_weight: float = Field(0.5, ge=0, description="Weight of the distillation term.")
    chunk_rows: int = Field(1024, ge=1, description="Rows whose logits stand in memory at a time.")

    @model_validator(mode="after")
    def _target_supports_divergence(self) -> Self:
        if self.target == "sampled_tail" and self.divergence != "forward_kl":
            raise ValueError(
                f"target='sampled_tail' is an expectation under the teacher and supports forward_kl only;"
                f" divergence={self.divergence!r} needs target='tail_bucket'"
            )
        if self.target == "renormalised" and self.divergence in ("reverse_kl", "skewed_reverse_kl"):
            raise ValueError(
                f"target='renormalised' gives the tail no mass, so divergence={self.divergence!r} is infinite or"
                f" ill-defined; use target='tail_bucket'"
            )
        return self


class LoraConfig(Settings):
    """Low-rank adapters beside frozen weights."""

    rank: int = Field(16, ge=1, le=1024, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale of the adapters, over the rank.")


class OnPolicyConfig(Settings):
    """Learning on the student's own words (GKD, Agarwal et al. 2024); needs the live teacher."""

    share: float = Field(0.0, ge=0, le=1, description="Share of the sequences that the student writes itself.")
    prompt_tokens: int = Field(32, ge=1, description="Tokens of the data that it goes on from.")
    new_tokens: int = Field(32, ge=1, description="Tokens that it writes.")
    temperature: float = Field(1.0, gt=0, le=100, description="Temperature of the student's draws.")


class StudentConfig(Settings):
    """The model that learns: a llama from scratch in this shape, or the weights of a folder."""

    init_from: str | None = Field(
        None, description="Folder, hub id or `embedded` to start from; from scratch if unset."
    )
    lora: LoraConfig | None = Field(None, description="Train adapters and not the weights; needs init_from.")
    hidden_size: int = Field(128, ge=8, description="Width.")
    num_layers: int = Field(4, ge=1, description="Blocks.")
    num_heads: int = Field(4, ge=1, description="Attention heads; divides hidden_size.")
    intermediate_size: int = Field(384, ge=8, description="Width of the feed-forward layers.")

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size}")
        if self.lora is not None and self.init_from is None:
            raise ValueError("lora needs init_from: adapters beside random weights learn nothing")
        return self


class TrainConfig(Settings):
    """The loop. The global batch is fixed, so a step has the same loss at any number of workers."""

    num_steps: int = Field(200, ge=1, description="Optimizer steps.")
    batch_sequences: int = Field(8, ge=1, description="Sequences of one step, of all workers together.")
    micro_batch_sequences: int = Field(4, ge=1, description="Sequences of one forward pass; the rest is accumulated.")
    learning_rate: float = Field(1e-3, gt=0, description="Highest rate, after the warm-up.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up; a cosine follows.")
    min_rate_share: float = Field(0.1, ge=0, le=1, description="Share of the rate that is left at the end.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on matrices only.")
    clip_norm: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the forward; weights and optimizer stay float32."
    )
    activation_checkpointing: bool = Field(False, description="Compute activations again instead of keeping them.")
    checkpoint_steps: int = Field(50, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, le=100, description="Checkpoints kept; the oldest go.")
    validate_steps: int = Field(50, ge=1, description="Steps between validations; the first is before step 1.")
    validation_sequences: int = Field(8, ge=1, description="Held-out sequences of a validation.")
    seed: int = Field(0, ge=0, description="Seed of weights and order.")
    device: str = Field("auto", description="`auto`, `cpu` or `cuda`.")


class AutoencoderConfig(Settings):
    """The variational autoencoder over chunks of tokens, after CALM (Shao et al. 2025)."""

    chunk_tokens: int = Field(4, ge=1, le=64, description="Tokens of one latent vector.")
    latent_size: int = Field(256, ge=1, description="Numbers of one latent vector.")
    hidden_size: int = Field(256, ge=8, description="Width.")
    num_layers: int = Field(1, ge=1, description="Blocks on each side of both the squeeze and the expansion.")
    dropout: float = Field(0.15, ge=0, lt=1, description="Share of masked tokens, and of dropped latent numbers.")
    kl_weight: float = Field(1e-3, ge=0, description="Weight of the divergence from a standard normal.")
    kl_floor: float = Field(0.5, ge=0, description="Divergence that each latent number has for free, in nats.")
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's highest rate.")
    num_steps: int = Field(400, ge=1, description="Optimizer steps.")
    batch_chunks: int = Field(256, ge=1, description="Chunks of one step.")
    num_negatives: int = Field(
        2048, ge=1, description="Tokens drawn to stand for those that a step has not; all if the vocabulary is smaller."
    )
    seed: int = Field(0, ge=0, description="Seed of weights, order, masks and noise.")


class LatentConfig(Settings):
    """The causal transformer that writes the next latent vector."""

    hidden_size: int = Field(128, ge=8, description="Width.")
    num_layers: int = Field(4, ge=1, description="Blocks.")
    num_heads: int = Field(4, ge=1, description="Attention heads; divides hidden_size.")
    intermediate_size: int = Field(384, ge=8, description="Width of the feed-forward layers.")
    noise_size: int = Field(64, ge=1, description="Random numbers that a sample starts from.")
    num_samples: int = Field(8, ge=2, le=256, description="Samples of the model in the energy loss.")
    num_targets: int = Field(32, ge=1, le=1024, description="Samples of the autoencoder's posterior in it.")
    exponent: float = Field(1.0, gt=0, lt=2, description="Power of the distance; below 2 the score is strictly proper.")
    token_choice: Literal["likeliest", "drawn"] = Field(
        "drawn", description="What a drawn vector becomes: its likeliest decoding, or one drawn from its decodings."
    )
    latent_weight: float = Field(0.1, ge=0, description="Weight of the energy loss.")
    ce_weight: float = Field(1.0, ge=0, description="Weight of the cross entropy of decoded samples.")
    ce_negatives: int = Field(
        2048, ge=1, description="Tokens drawn in a pass to stand for those that its text has not; at most all."
    )
    kd_weight: float = Field(
        0.0, ge=0, description="Weight of the divergence to the teacher, on first tokens of chunks."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide hidden_size={self.hidden_size}")
        return self


class AlignmentConfig(Settings):
    """What is done where teacher and student cut text differently."""

    method: Literal["off", "bytes"] = Field("off", description="`bytes` carries rows over by the bytes of tokens.")
    min_mass_share: float = Field(
        0.5, ge=0, le=1, description="Least share of the teacher's probability with a counterpart."
    )


class DistillConfig(Settings):
    """One distillation, from text to a student."""

    alignment: AlignmentConfig = Field(AlignmentConfig(), description="Between two tokenizers.")

    pack: PackConfig = Field(PackConfig(), description="How text becomes sequences.")
    teacher: TeacherConfig = Field(TeacherConfig(), description="Who teaches.")
    client: ClientConfig = Field(ClientConfig(), description="How a served teacher is asked.")
    cache: CacheConfig = Field(CacheConfig(), description="Where its answers are kept.")
    store: StoreConfig = Field(StoreConfig(), description="The teacher's rows for the whole corpus.")
    loss: LossConfig = Field(LossConfig(), description="What is learnt from them.")
    on_policy: OnPolicyConfig = Field(OnPolicyConfig(), description="Learning on the student's own words.")
    student: StudentConfig = Field(StudentConfig(), description="The causal student.")
    autoencoder: AutoencoderConfig = Field(AutoencoderConfig(), description="The latent student's autoencoder.")
    latent: LatentConfig = Field(LatentConfig(), description="The latent student.")
    train: TrainConfig = Field(TrainConfig(), description="The loop.")


class WorkersConfig(Settings):
    """Training on a Ray cluster: how many workers, where, and how often they may fail."""

    num_workers: int = Field(1, ge=1, le=64, description="Workers when all nodes are there.")
    min_workers: int | None = Field(None, ge=1, description="Go on with as few as these; all or none when unset.")
    spread: bool = Field(False, description="Put every worker on a node of its own.")
    resize_seconds: float = Field(
        60.0, gt=0, description="With min_workers: how often nodes that came back are looked for."
    )
    cpus_per_worker: float = Field(1.0, gt=0, description="Logical CPUs of a worker.")
    max_failures: int = Field(8, ge=0, description="Restarts from the last checkpoint before the run gives up.")
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="`auto` takes GPUs where the cluster has.")

    @model_validator(mode="after")
    def _fewest_is_not_more(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers={self.min_workers} must not exceed num_workers={self.num_workers}")
        return self


class TrainJobConfig(Settings):
    """One training run on a cluster; every path must be seen by all nodes."""

    pack: str = Field(description="Folder of the pack.")
    out: str = Field(description="Folder of checkpoints, metrics and the student.")
    store: str | None = Field(None, description="Folder of the teacher's rows.")
    live: bool = Field(False, description="Ask the teacher of the settings while training.")
    distill: DistillConfig = Field(DistillConfig(), description="Everything else.")
    workers: WorkersConfig = Field(WorkersConfig(), description="The cluster's part.")
