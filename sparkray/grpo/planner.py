"""Does a training run fit, and how long is a step: arithmetic over the memory of the nodes and a cost model.

A run has two tenants: the trainer, sharded over some nodes (FSDP), and the engine that draws rollouts, on the same
nodes or on others. `together` puts a part of both on every node; `apart` gives the engine one node of its own.

The cost model is an estimate, not a measurement: compute at a share of the table value, decoding bound by reading the
weights once a token, gathers bound by the link. NVIDIA's published fine-tuning rates are not used: at 6N operations a
token they come to 14 to 17 times what the machine's table value allows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sparkray.config.grpo import MethodName
from sparkray.errors import InputError, NotFoundError
from sparkray.hardware.fit import DGX_SPARK, GB, KNOWN_SHAPES, Demand, Fit, ModelShape, NodeMemory, fit, fit_training

Layout = Literal["together", "apart"]

# DGX Spark: bf16 table value, memory bandwidth (NVIDIA), all_gather rate with both halves of the cable tuned.
PEAK_FLOPS = 104e12
MEMORY_BYTES_PER_SECOND = 273e9
LINK_BYTES_PER_SECOND = 23.7e9
_COMPUTE_SHARE = 0.35
_BANDWIDTH_SHARE = 0.7
_ADAPTER_BYTES_PER_PARAM = 16  # fp32 weight, gradient and AdamW's two moments
_ADAPTER_SHARE = 0.01  # rank 16 over all linear layers, of the model's parameters
_ACTIVATION_GB = 4.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What a step does.

    Attributes:
        num_prompts, num_generations: completions are their product.
        prompt_tokens, completion_tokens: of each.
    """

    num_prompts: int = 32
    num_generations: int = 8
    prompt_tokens: int = 256
    completion_tokens: int = 512

    @property
    def num_completions(self) -> int:
        return self.num_prompts * self.num_generations

    @property
    def num_train_tokens(self) -> int:
        """Positions of a step's forward, prompts shared by their completions."""
        return self.num_prompts * self.prompt_tokens + self.num_completions * self.completion_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to place a run.

    Attributes:
        method, layout, num_nodes: the way.
        trainer_bits, engine_bits: bits of a weight on either side.
        trainer, engine: whether each fits; with `together` both are the same answer.
        step_seconds: estimated parts of a step, empty where it does not fit.
    """

    method: MethodName
    layout: Layout
    num_nodes: int
    trainer_bits: int
    engine_bits: int
    trainer: Fit
    engine: Fit
    step_seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        return self.trainer.fits and self.engine.fits

    @property
    def title(self) -> str:
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        return (
            f"{self.method}, trainer {self.trainer_bits} bits, engine {self.engine_bits} bits, {self.layout}, {nodes}"
        )

    @property
    def why(self) -> str:
        if self.layout == "together":
            return self.trainer.why
        return f"trainer: {self.trainer.why}; engine: {self.engine.why}"

    def to_dict(self) -> dict[str, object]:
        return {
            "method": self.method,
            "layout": self.layout,
            "num_nodes": self.num_nodes,
            "trainer_bits": self.trainer_bits,
            "engine_bits": self.engine_bits,
            "fits": self.fits,
            "needed_gb_per_node": max(self.trainer.needed_bytes_per_node, self.engine.needed_bytes_per_node) / GB,
            "usable_gb_per_node": self.trainer.usable_bytes_per_node / GB,
            "why": self.why,
            "step_seconds": self.step_seconds,
        }


def plan_run(
    shape: ModelShape,
    *,
    method: MethodName,
    num_nodes: int,
    layout: Layout = "together",
    engine_bits: int = 16,
    node: NodeMemory = DGX_SPARK,
    workload: Workload | None = None,
) -> Plan:
    """Whether this way of placing a run fits, and what a step of it would take.

    Raises:
        InputError: `apart` on a single node.
    """
    if layout == "apart" and num_nodes < 2:
        raise InputError("the engine was to have a node of its own, and there is only one node.", param="nodes")
    workload = workload if workload is not None else Workload()
    trainer_bits = 4 if method == "qlora" else 16
    num_trainers = num_nodes if layout == "together" else num_nodes - 1
    num_engine_nodes = num_nodes if layout == "together" else 1
    frozen = replace(shape, bits=trainer_bits)
    served = replace(shape, bits=engine_bits)
    context = workload.num_completions * (workload.prompt_tokens + workload.completion_tokens)
    # Weights are cut over the nodes where one node is too small for them; smaller ones are held whole on each.
    num_cuts = num_engine_nodes if served.weight_bytes > 0.25 * node.usable_bytes else 1
    engine = [
        Demand(f"engine's weights at {engine_bits} bits", served.weight_bytes, num_cuts),
        Demand("engine's KV cache", min(served.kv_bytes_per_token * context, 16 * GB), num_engine_nodes),
    ]
    extra = [Demand("activations", _ACTIVATION_GB * GB)]
    if method != "full":
        adapter_bytes = shape.num_params * _ADAPTER_SHARE * _ADAPTER_BYTES_PER_PARAM
        extra.append(Demand("adapter with AdamW", adapter_bytes, num_trainers))
    kind: Literal["full", "lora"] = "full" if method == "full" else "lora"
    beside = [*extra, *engine] if layout == "together" else extra
    trainer_fit = fit_training(frozen, node, method=kind, num_nodes=num_trainers, beside=beside)
    engine_fit = trainer_fit if layout == "together" else fit(engine, node)
    draft = Plan(method, layout, num_nodes, trainer_bits, engine_bits, trainer_fit, engine_fit, {})
    if not draft.fits:
        return draft
    return replace(draft, step_seconds=_step_seconds(frozen, served, draft, num_trainers, num_cuts, workload))


def alternatives(
    shape: ModelShape, *, max_nodes: int, node: NodeMemory = DGX_SPARK, workload: Workload | None = None
) -> list[Plan]:
    """Every way that fits on up to `max_nodes` nodes, fewest nodes and most bits first."""
    found = [
        plan_run(
            shape,
            method=method,
            num_nodes=num_nodes,
            layout=layout,
            engine_bits=engine_bits,
            node=node,
            workload=workload,
        )
        for num_nodes, method, layout, engine_bits in _ways(max_nodes)
    ]
    return [plan for plan in found if plan.fits]


def find_shape(name: str) -> ModelShape:
    """The shape of a known size ("7B"), of a model directory, or of a hub id that ends in a known size.

    Raises:
        NotFoundError: none of them.
        InputError: a directory whose config.json does not say what memory depends on.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return shape_of_config(name, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for shape in sorted(KNOWN_SHAPES, key=lambda shape: -len(shape.name)):
        # The size as a word of its own: 7B is not in 72B, and not in 1.7B.
        if re.search(rf"(?:^|[^\w.]){re.escape(shape.name)}(?:$|\W)", name, re.IGNORECASE):
            return shape
    known = ", ".join(shape.name for shape in KNOWN_SHAPES)
    raise NotFoundError(
        f"the size of model {name!r} is not known.",
        hint=f"Give one of {known}, or a directory with config.json.",
        param="model",
    )


def shape_of_config(name: str, config: dict[str, object]) -> ModelShape:
    """The shape that a config.json of a dense model of the Llama family describes."""
    try:
        hidden, layers = _number(config, "hidden_size"), _number(config, "num_hidden_layers")
        heads = _number(config, "num_attention_heads")
        inner, vocab = _number(config, "intermediate_size"), _number(config, "vocab_size")
    except KeyError as missing:
        raise InputError(f"config.json of {name!r} has no {missing}, which memory depends on.", param="model") from None
    kv_heads = int(str(config.get("num_key_value_heads") or heads))
    head_dim = int(str(config.get("head_dim") or hidden // heads))
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    num_params = layers * (attention + 3 * hidden * inner + 2 * hidden) + embeddings + hidden
    return ModelShape(name, float(num_params), layers, kv_heads, head_dim)


def _number(config: dict[str, object], key: str) -> int:
    return int(str(config[key]))


def _ways(max_nodes: int) -> Iterator[tuple[int, MethodName, Layout, int]]:
    methods: tuple[MethodName, ...] = ("full", "lora", "qlora")
    layouts: tuple[Layout, ...] = ("together", "apart")
    for num_nodes in range(1, max_nodes + 1):
        for method in methods:
            for layout in layouts:
                for engine_bits in (16, 8, 4):
                    # Full training changes every weight, and a 4-bit engine would have to be quantised at each push.
                    if (layout == "apart" and num_nodes == 1) or (method == "full" and engine_bits != 16):
                        continue
                    yield num_nodes, method, layout, engine_bits


def _step_seconds(
    frozen: ModelShape, served: ModelShape, plan: Plan, num_trainers: int, num_cuts: int, workload: Workload
) -> dict[str, float]:
    num_engines = 1 if plan.layout == "apart" or num_cuts > 1 else plan.num_nodes
    bandwidth = MEMORY_BYTES_PER_SECOND * _BANDWIDTH_SHARE
    flops = PEAK_FLOPS * _COMPUTE_SHARE
    running = workload.num_completions / num_engines
    per_token = served.weight_bytes / num_cuts / bandwidth
    kv_bytes = served.kv_bytes_per_token * (workload.prompt_tokens + workload.completion_tokens / 2) * running
    compute = 2 * served.num_params * running / (flops * num_cuts)
    generate = workload.completion_tokens * max(per_token + kv_bytes / num_cuts / bandwidth, compute)
    operations = 6 if plan.method == "full" else 4
    train = operations * frozen.num_params * workload.num_train_tokens / (flops * num_trainers)
    gather = 0.0
    if num_trainers > 1:
        passes = 3 if plan.method == "full" else 2
        gather = passes * frozen.weight_bytes / LINK_BYTES_PER_SECOND
    pushed = served.weight_bytes if plan.method == "full" else frozen.num_params * _ADAPTER_SHARE * 4
    push = pushed / LINK_BYTES_PER_SECOND
    parts = {"generate": generate, "train": train, "gather": gather, "push": push}
    return {**parts, "total": sum(parts.values())}


def table(shape: ModelShape, plans: Sequence[Plan]) -> list[str]:
    """The plans as lines of text."""
    lines = [f"{shape.name}: {shape.num_params / 1e9:.1f}B parameters"]
    for plan in plans:
        seconds = f"  about {plan.step_seconds['total']:.0f} s a step" if plan.step_seconds else ""
        lines.append(f"{'fits    ' if plan.fits else 'too big '}  {plan.title}{seconds}")
        lines.append(f"          {plan.why}")
    return lines
