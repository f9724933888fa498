"""Settings of proof of compute: the model that is computed, how its weights are drawn, and the named presets.

Field names of `ModelParams` are the network's own (they travel in the body of `/api/v1/pow/init`).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sparkray.config.base import Settings, validate_settings
from sparkray.errors import UsageError

WeightsName = Literal["pool", "sequential"]
ModeName = Literal["compatible", "hardened"]
FormulaName = Literal["v1", "v2"]
BatchSize = Annotated[int, Field(ge=1, le=65_536)] | FormulaName | None

R_TARGET_DEFAULT = 1.3971164020989417


class ModelParams(Settings):
    """Shape of the transformer that a nonce is sent through; every field is consensus."""

    dim: int = Field(2048, ge=2, le=65_536, description="Width of the residual stream.")
    n_layers: int = Field(16, ge=1, le=1024, description="Transformer blocks.")
    n_heads: int = Field(16, ge=1, le=1024, description="Query heads; divides dim.")
    n_kv_heads: int = Field(16, ge=1, le=1024, description="Key and value heads; divides n_heads.")
    vocab_size: int = Field(8192, ge=2, le=1_048_576, description="Width of the output head.")
    ffn_dim_multiplier: float = Field(1.3, gt=0, le=64, description="Multiplier of the feed-forward width.")
    multiple_of: int = Field(1024, ge=1, le=65_536, description="The feed-forward width is rounded up to this.")
    norm_eps: float = Field(1e-5, gt=0, lt=1, description="Epsilon inside the RMS norm.")
    rope_theta: float = Field(500_000.0, gt=0, description="Base of the rotary frequencies.")
    use_scaled_rope: bool = Field(False, description="Llama 3.1 frequency scaling (factor 8, old context 8192).")
    seq_len: int = Field(16, ge=1, le=16_384, description="Positions of one nonce's input.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(f"n_heads={self.n_heads} must divide dim={self.dim} into heads of even width")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} must divide n_heads={self.n_heads}")
        return self

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_dim(self) -> int:
        return self.head_dim * self.n_kv_heads

    @property
    def ffn_hidden(self) -> int:
        """Width of the feed-forward layer, by the Llama 3 rule (both truncations are part of it)."""
        wanted = int(self.ffn_dim_multiplier * int(2 * 4 * self.dim / 3))
        return self.multiple_of * -(-wanted // self.multiple_of)

    @property
    def layer_numel(self) -> int:
        """Elements of one block, its two norm gains included."""
        return 2 * self.dim * (self.dim + self.kv_dim) + 3 * self.dim * self.ffn_hidden + 2 * self.dim

    @property
    def num_params(self) -> int:
        """Elements of the whole model; the unused token embedding counts, as on the network."""
        return 2 * self.vocab_size * self.dim + self.n_layers * self.layer_numel + self.dim

    @property
    def flop_per_nonce(self) -> float:
        """Floating point operations of one nonce, the head on the last position only."""
        matrices = 2 * self.dim * (self.dim + self.kv_dim) + 3 * self.dim * self.ffn_hidden
        attention = 2 * self.dim * self.seq_len
        return 2.0 * (self.n_layers * self.seq_len * (matrices + attention) + self.vocab_size * self.dim)


class WeightsConfig(Settings):
    """How weights are drawn from a block hash. Each name, and each pool fraction, is a different consensus."""

    name: WeightsName = Field("pool", description="`pool`: slices of one small draw; `sequential`: one long draw.")
    pool_fraction: float | None = Field(0.05, gt=0, le=1, description="Share of all elements in the pool; pool only.")

    @model_validator(mode="after")
    def _fraction_goes_with_pool(self) -> Self:
        if (self.name == "pool") != (self.pool_fraction is not None):
            raise ValueError("name='pool' needs a pool_fraction, and name='sequential' takes none (null)")
        return self

    @property
    def label(self) -> str:
        """The mode's name on the command line and in proofs: `pool:0.05` or `sequential`."""
        return "sequential" if self.pool_fraction is None else f"pool:{self.pool_fraction:g}"

    @classmethod
    def parse(cls, label: str) -> Self:
        """Read a label: `sequential`, or `pool:FRACTION`.

        Raises:
            UsageError: neither of the two.
        """
        name, _, fraction = label.partition(":")
        return validate_settings(cls, {"name": name, "pool_fraction": fraction or None})


V1 = ModelParams(
    dim=1024, n_layers=32, n_heads=32, n_kv_heads=32, vocab_size=8196,
    ffn_dim_multiplier=10.0, multiple_of=2048, rope_theta=10_000.0, seq_len=128,
)  # fmt: skip
V2 = ModelParams(
    dim=1792, n_layers=64, n_heads=64, n_kv_heads=64, vocab_size=8196,
    ffn_dim_multiplier=10.0, multiple_of=8192, rope_theta=10_000.0, seq_len=256,
)  # fmt: skip
# Found by `sparkray poc plan` for one GB10: 34 GB, a start below a minute, over 500 valid nonces an hour.
BIG = ModelParams(
    dim=2048, n_layers=48, n_heads=32, n_kv_heads=32, vocab_size=8192,
    ffn_dim_multiplier=10.0, multiple_of=1024, rope_theta=10_000.0, seq_len=64,
)  # fmt: skip
TINY = ModelParams(
    dim=128, n_layers=4, n_heads=4, n_kv_heads=4, vocab_size=128,
    ffn_dim_multiplier=1.3, multiple_of=1024, rope_theta=500_000.0, seq_len=16,
)  # fmt: skip

# A preset is a shape and a way of drawing its weights.
PRESETS: dict[str, tuple[ModelParams, WeightsConfig]] = {
    "V1": (V1, WeightsConfig(pool_fraction=0.05)),
    "V2": (V2, WeightsConfig(pool_fraction=0.05)),
    "BIG": (BIG, WeightsConfig(pool_fraction=0.15)),
    "TINY": (TINY, WeightsConfig(pool_fraction=0.05)),
}


def preset(name: str) -> tuple[ModelParams, WeightsConfig]:
    """The preset of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} was asked for, and {', '.join(PRESETS)} exist.", param="preset")
    return PRESETS[name]


class PocConfig(Settings):
    """One run of proof of compute."""

    params: ModelParams = Field(V1, description="Shape of the model; the presets are V1, V2, BIG and TINY.")
    weights: WeightsConfig = Field(WeightsConfig(), description="How weights are drawn.")
    mode: ModeName = Field("compatible", description="`compatible` with the network, or `hardened`.")
    block_hash: str = Field(
        coerce_numbers_to_str=True, description="Hash of the block that seeds weights, inputs and target."
    )
    public_key: str = Field(
        coerce_numbers_to_str=True, description="Key of the participant; seeds inputs and permutations."
    )
    block_height: int = Field(-1, ge=-1, description="Height that proofs carry.")
    r_target: float = Field(R_TARGET_DEFAULT, gt=0, description="A nonce is valid where its distance is below this.")
    fraud_threshold: float = Field(1e-7, gt=0, lt=1, description="p-value below which a batch is called fraud.")
    node_id: int = Field(0, ge=0, description="Residue class of this node's nonces.")
    node_count: int = Field(1, ge=1, description="Nodes that share the nonces of one key.")
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`.")
    batch_size: BatchSize = Field(
        None, description="Nonces in a batch; empty: measured; `v1`, `v2`: by the network's formula of that preset."
    )
    num_prep_threads: int = Field(2, ge=1, le=256, description="Threads that make inputs ahead.")
    prep_depth: int = Field(3, ge=1, le=64, description="Batches that are made ahead.")

    @model_validator(mode="after")
    def _node_is_counted(self) -> Self:
        if self.node_id >= self.node_count:
            raise ValueError(f"node_id={self.node_id} must be below node_count={self.node_count}")
        return self


class PocServiceConfig(Settings):
    """The service of proof of compute: its groups, its bounds and its callbacks."""

    state_dir: str = Field(
        "~/.local/state/sparkray/poc", min_length=1, description="Folder of the ledger, on the head node."
    )
    weights: WeightsConfig = Field(WeightsConfig(), description="How weights are drawn; consensus.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="`auto`: CUDA where the cluster has some.")
    num_groups: int | None = Field(None, ge=1, le=4096, description="Groups; empty: as many as the devices make.")
    num_nodes_per_group: int = Field(
        1, ge=1, le=64, description="Nodes that share one group's blocks, for a model that no node holds alone."
    )
    num_cpus_per_group: float = Field(1.0, gt=0, le=1024, description="Logical CPUs for a group, on each of its nodes.")
    batch_size: BatchSize = Field(
        None, description="Nonces in a batch; empty: measured; `v1`, `v2`: by the network's formula of that preset."
    )
    num_prep_threads: int = Field(2, ge=1, le=256, description="Threads of a group that make inputs ahead.")
    prep_depth: int = Field(3, ge=1, le=64, description="Batches of a group that are made ahead.")
    max_buffered_batches: int = Field(64, ge=1, le=4096, description="Computed batches that a group holds, at most.")
    poll_seconds: float = Field(1.0, gt=0, le=60, description="Between two looks at the groups, and two callbacks.")
    max_unsent: int = Field(10_000, ge=1, description="Callbacks that may wait; beyond it generation pauses.")
    max_batches: int = Field(1000, ge=1, description="Received batches that may wait for their verdict.")
    max_batch_nonces: int = Field(100_000, ge=1, description="Nonces of one received batch, at most.")
    deadline_seconds: float = Field(900.0, gt=0, description="After this a received batch is answered as not judged.")
    noise_sd: float = Field(1.9e-5, gt=0, lt=1, description="Noise between distances of two honest machines.")
    phase_timeout_seconds: float = Field(30.0, gt=0, description="How long a request waits for all groups to follow.")
    load_patience_seconds: float = Field(120.0, gt=0, description="Then loaded groups begin without the others.")
    stop_timeout_seconds: float = Field(60.0, gt=0, description="Time to record everything when groups are stopped.")
    callback_timeout_seconds: float = Field(10.0, gt=0, description="Time limit of one callback.")
    callback_interval_seconds: float = Field(1.0, gt=0, description="Between two looks at the outbox.")
    max_backoff_seconds: float = Field(30.0, gt=0, description="Longest pause after failed callbacks.")
