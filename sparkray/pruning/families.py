"""The model families whose experts can be cut: where they keep experts and router rows, in a few lines each.

A family of transformers 5 whose experts module takes (hidden states, expert ids, gates) needs one `Family(...)`
here: the name of the sparse block inside a decoder layer on disk, and the router's tensors that have one row
an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sparkray.errors import InputError

# Several spellings of one number are in use, and transformers lets an alias win over the main key: all are edited.
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K_KEYS = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token")

ExpertsInterface = Literal["routed", "gated_input"]


@dataclass(frozen=True, slots=True)
class Family:
    """Where one model type keeps its experts.

    Attributes:
        model_type: `model_type` of config.json.
        block: the sparse block inside a decoder layer, as spelled in the checkpoint.
        router: tensors under `block` with one row an expert.
        interface: `routed` calls experts(hidden, ids, gates); `gated_input` multiplies the gate into the
            expert's input and runs every expert (Llama 4).
        text_config: key of the nested config that describes the language model, or None.
    """

    model_type: str
    block: str = "mlp"
    router: tuple[str, ...] = ("gate.weight",)
    interface: ExpertsInterface = "routed"
    text_config: str | None = None


_BIASED_GATE = ("gate.weight", "gate.e_score_correction_bias")

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen3_moe"),
        Family("gpt_oss", router=("router.weight", "router.bias")),
        Family("llama4_text", block="feed_forward", router=("router.weight",), interface="gated_input"),
        Family(
            "llama4",
            block="feed_forward",
            router=("router.weight",),
            interface="gated_input",
            text_config="text_config",
        ),
        Family("mixtral", block="block_sparse_moe"),
        Family("deepseek_v2"),
        Family("ernie4_5_moe", router=("gate.weight", "moe_statics.e_score_correction_bias")),
        Family("glm4_moe", router=_BIASED_GATE),
        # The same contract, one line each.
        Family("afmoe", router=("router.gate.weight", "expert_bias")),
        Family("deepseek_v3", router=_BIASED_GATE),
        Family("deepseek_v32", router=_BIASED_GATE),
        Family("dots1", router=_BIASED_GATE),
        Family("exaone_moe", router=("gate.weight", "e_score_correction_bias")),
        Family("flex_olmo"),
        Family("glm4_moe_lite", router=_BIASED_GATE),
        Family("hunyuan_v1_moe", router=("gate.wg.weight",)),
        Family("jamba", block="feed_forward", router=("router.weight",)),
        Family("lfm2_moe", block="feed_forward", router=("gate.weight", "expert_bias")),
        Family("mimo_v2_flash", router=_BIASED_GATE),
        Family("minimax_m2", block="block_sparse_moe", router=("gate.weight", "e_score_correction_bias")),
        Family("olmoe"),
        Family("phimoe", block="block_sparse_moe"),
        Family("qwen2_moe"),
        Family("qwen3_5_moe_text"),
        Family("qwen3_next"),
        Family("solar_open", router=_BIASED_GATE),
    )
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        InputError: no model type, an unknown one, or a model without experts.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError("config.json has no model_type, so its family of experts is not known.")
    family = FAMILIES.get(model_type)
    if family is not None:
        expert_count(config, family)
        return family
    if not any(isinstance(config.get(key), int) for key in EXPERT_COUNT_KEYS):
        raise InputError(
            f"the model type {model_type!r} names no number of experts: it is a dense model, and pruning needs a"
            " mixture of experts.",
            hint=f"Known mixtures are {', '.join(sorted(FAMILIES))}.",
        )
    raise InputError(
        f"the model type {model_type!r} has experts, but its layout is not in the registry.",
        hint=f"Known are {', '.join(sorted(FAMILIES))}; a family is added in sparkray/pruning/families.py.",
    )


def text_config(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model."""
    if family.text_config is None:
        return config
    nested = config.get(family.text_config)
    if not isinstance(nested, dict):
        raise InputError(f"config.json of a {family.model_type} model needs a {family.text_config!r} object.")
    return nested


def expert_count(config: Mapping[str, Any], family: Family) -> int:
    """Experts of one sparse layer, as the config says."""
    values = {key: value for key in EXPERT_COUNT_KEYS if isinstance(value := _get(config, family, key), int)}
    if not values or max(values.values()) < 2:
        raise InputError(
            f"config.json of a {family.model_type} model names no experts ({', '.join(EXPERT_COUNT_KEYS)}):"
            " it is a dense model, and pruning needs a mixture of experts."
        )
    if len(set(values.values())) > 1:
        raise InputError(
            f"config.json names different numbers of experts: {values}.", hint="Set them to the checkpoint's number."
        )
    return next(iter(values.values()))


def top_k(config: Mapping[str, Any], family: Family) -> int:
    """Experts that one token is routed to."""
    for key in TOP_K_KEYS:
        value = _get(config, family, key)
        if isinstance(value, int):
            return value
    raise InputError(f"config.json names no experts a token ({', '.join(TOP_K_KEYS)}).")


def group_limits(config: Mapping[str, Any], family: Family) -> tuple[int, int]:
    """(number of expert groups, groups a token may use) of a group-limited router; (1, 1) without groups."""
    num_groups = _get(config, family, "n_group")
    used = _get(config, family, "topk_group")
    return (num_groups if isinstance(num_groups, int) else 1, used if isinstance(used, int) else 1)


def _get(config: Mapping[str, Any], family: Family, key: str) -> object:
    return text_config(config, family).get(key)
