"""Settings of reinforcement learning by GRPO: what is trained, on which rewards, by which loss, on which machines."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from sparkray.config.base import Settings
from sparkray.config.serve import EngineConfig

Algorithm = Literal["grpo", "dpo"]
MethodName = Literal["full", "lora", "qlora"]
LossName = Literal["grpo", "dr_grpo", "dapo", "cispo", "gspo"]
AdvantageName = Literal["group", "dr_grpo", "leave_one_out"]
RewardKind = Literal["exact", "math", "reasoning_gym", "python", "http"]
SyncName = Literal["object_store", "lora"]
PackingName = Literal["shared_prefix", "plain"]


class LossConfig(Settings):
    """The policy loss and what holds it back."""

    name: LossName = Field("dr_grpo", description="How tokens are weighed; `gspo` clips whole sequences.")
    advantage: AdvantageName = Field("group", description="What a reward is compared with.")
    clip_low: float = Field(0.2, ge=0, lt=1, description="A ratio below 1 - this is clipped.")
    clip_high: float = Field(0.28, ge=0, description="A ratio above 1 + this is clipped.")
    cispo_max_ratio: float = Field(5.0, gt=0, description="`cispo` holds its weight below this.")
    kl_beta: float = Field(0.0, ge=0, description="Weight of the KL to the model that training started from.")
    token_ratio_cap: float = Field(2.0, gt=0, description="Trainer-to-engine ratio of a token is cut off here.")
    geometric_low: float = Field(0.9, gt=0, le=1, description="A sequence below this mean ratio is left out.")
    geometric_high: float = Field(1.1, ge=1, description="A sequence above this mean ratio is left out.")


class RewardTermConfig(Settings):
    """One verifiable reward."""

    kind: RewardKind = Field(description="`exact` and `math` read the column `answer`; `reasoning_gym` reads `entry`.")
    target: str = Field("", description="`module:function` of a `python` reward, the address of an `http` one.")
    weight: float = Field(1.0, description="What it counts in the sum.")

    @model_validator(mode="after")
    def _has_target(self) -> Self:
        if self.kind == "python" and ":" not in self.target:
            raise ValueError(f"target of a python reward is 'module:function', and {self.target!r} was given")
        if self.kind == "http" and not self.target.startswith(("http://", "https://")):
            raise ValueError(f"target of an http reward is an address, and {self.target!r} was given")
        if self.kind not in ("python", "http") and self.target:
            raise ValueError(f"a reward of kind {self.kind!r} has no target")
        return self


class RewardConfig(Settings):
    """What a completion is worth."""

    terms: tuple[RewardTermConfig, ...] = Field((), description="Verifiable rewards; their weighted sum is the base.")
    cognitive_weight: float = Field(0.0, ge=0, description="Weight of METIS's cognitive reward, as shaping.")
    time_limit_seconds: float = Field(10.0, gt=0, description="A reward that takes longer costs its sample.")
    num_workers: int = Field(1, ge=1, le=256, description="Processes that score; CPU only.")

    @model_validator(mode="after")
    def _any(self) -> Self:
        if not self.terms and self.cognitive_weight == 0:
            raise ValueError("no reward was given: name a term in reward.terms, or set reward.cognitive_weight")
        return self


class SyncConfig(Settings):
    """How new weights reach the engines, and how it is checked that they did."""

    transport: SyncName = Field("object_store", description="Merged tensors that changed, or the adapter alone.")
    max_gap: float = Field(1e-3, gt=0, description="Largest allowed |log-probability| gap of the canary, in fp32.")
    max_growth: float = Field(4.0, gt=1, description="In bf16: alarm where the gap grew by this since the first push.")
    canary: str = Field(
        "The capital of France is Paris, and it lies on the Seine. 2 + 2 = 4, 3 + 5 = 8, and 9 - 7 = 2.",
        min_length=8,
        description="Text that both sides score after every push.",
    )


class GrpoConfig(Settings):
    """One training run. The same name and output directory go on where a killed run was."""

    model: str = Field("embedded", min_length=1, description="`embedded`, a local directory or a hub id.")
    dataset: str = Field(min_length=1, description="JSONL, JSON or Parquet in TRL's format: `prompt` and columns.")
    eval_dataset: str | None = Field(None, description="Held-out rows, answered greedily and scored.")
    eval_steps: int = Field(50, ge=1, description="Steps between two looks at them; also before and after.")
    eval_generations: int = Field(0, ge=0, le=64, description="Answers drawn to each as well, at `temperature`.")
    output_dir: str = Field(min_length=1, description="Folder of checkpoints, curves and the report; all nodes see it.")
    run_name: str = Field("grpo", pattern=r"^[A-Za-z0-9][\w.-]*$", description="Folder of the run in the output.")
    algorithm: Algorithm = Field("grpo", description="`dpo` draws once, and trains on the best and worst of a group.")
    dpo_beta: float = Field(0.1, gt=0, description="How far `dpo` may leave the model that it starts from.")
    method: MethodName = Field("lora", description="What is trained; `qlora` keeps the frozen weights in 4 bits.")
    lora_rank: int = Field(16, ge=1, le=512)
    lora_alpha: float = Field(32.0, gt=0)
    lora_layers: tuple[int, int] | None = Field(None, description="First and one past the last layer; all by default.")
    lora_targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), min_length=1
    )
    bf16: bool = Field(False, description="Compute in bf16; what is trained stays in fp32.")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice, to hold fewer.")

    num_generations: int = Field(8, ge=2, le=1024, description="Completions of a prompt: its group.")
    prompts_per_step: int = Field(8, ge=1, description="Prompts of one optimizer step, over all ranks.")
    num_iterations: int = Field(1, ge=1, description="Passes over the rollouts of a step.")
    max_completion_tokens: int = Field(64, ge=1)
    max_prompt_tokens: int = Field(512, ge=1)
    temperature: float = Field(1.0, gt=0, le=2, description="One for a whole group; top_p is always 1.")
    stop: tuple[str, ...] = Field((), description="Texts that end a completion.")
    epochs: float = Field(1.0, gt=0, description="Passes over the dataset; `max_steps` overrides it.")
    max_steps: int | None = Field(None, ge=1)
    steps_off: Literal[0, 1] = Field(0, description="1 generates the next step's rollouts while this one is trained.")
    max_staleness: int = Field(1, ge=0, le=8, description="Rollouts older than so many versions are not trained on.")

    learning_rate: float = Field(1e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    micro_batch_tokens: int = Field(4096, ge=16, description="Tokens of one forward; more rows accumulate gradients.")
    packing: PackingName = Field("shared_prefix", description="Whether completions of a prompt share its tokens.")
    seed: int = Field(0, ge=0)
    shuffle_advantages: bool = Field(False, description="A control: deal the advantages out at random.")

    num_ranks: int = Field(1, ge=1, le=512, description="Training processes; with `spread`, one a node.")
    num_engines: int = Field(1, ge=1, le=512, description="Rollout engines.")
    spread: bool = Field(False, description="Each rank on a node of its own.")
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    cpus_per_rank: float = Field(1.0, gt=0)
    cpus_per_engine: float = Field(1.0, gt=0)
    checkpoint_steps: int = Field(1, ge=1, description="Steps between checkpoints.")
    max_failures: int = Field(3, ge=0, description="Times that a dead rank or engine is replaced.")
    start_timeout_seconds: float = Field(900.0, gt=0)
    step_timeout_seconds: float = Field(1800.0, gt=0)

    loss: LossConfig = Field(default_factory=LossConfig)
    reward: RewardConfig = Field(default_factory=lambda: RewardConfig(terms=(RewardTermConfig(kind="exact"),)))
    sync: SyncConfig = Field(default_factory=SyncConfig)
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig(dtype="float32", max_model_len=1024))

    def fixed_by_run(self) -> dict[str, Any]:
        """What a run that goes on must have in common with what it did before."""
        names = {
            *("model", "dataset", "method", "lora_rank", "lora_alpha", "lora_layers", "lora_targets", "seed"),
            *("num_generations", "prompts_per_step", "shuffle_advantages", "algorithm"),
        }
        return self.model_dump(mode="json", include=names)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.method == "full" and self.sync.transport == "lora":
            raise ValueError("sync.transport is 'lora', and method 'full' has no adapter to push")
        if self.method == "qlora" and self.sync.transport != "lora":
            raise ValueError("merging an adapter into 4-bit weights loses it: qlora needs sync.transport = 'lora'")
        if self.max_prompt_tokens + self.max_completion_tokens > self.engine.max_model_len:
            raise ValueError(
                f"max_prompt_tokens ({self.max_prompt_tokens}) and max_completion_tokens "
                f"({self.max_completion_tokens}) are together above engine.max_model_len ({self.engine.max_model_len})"
            )
        if self.algorithm == "dpo" and self.method == "full":
            raise ValueError("algorithm 'dpo' trains an adapter, beside which the untrained model is the reference")
        if self.prompts_per_step % self.num_ranks:
            raise ValueError(
                f"prompts_per_step ({self.prompts_per_step}) must be a multiple of num_ranks ({self.num_ranks})"
            )
        if self.steps_off > self.max_staleness:
            raise ValueError(f"steps_off is {self.steps_off}, and max_staleness {self.max_staleness} would drop it all")
        return self
