"""Sizes of a checkpoint that is not there: tensor headers from config.json alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from sparkray.errors import InputError, NotFoundError
from sparkray.pruning.families import expert_count, family_of
from sparkray.pruning.sizes import CheckpointSize

_EXPERT_WEIGHT = re.compile(r"\.experts\.(gate_up_proj|up_proj|down_proj)$")
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def size_from_config(path: Path) -> CheckpointSize:
    """Tensor bytes of a model as a function of its experts, from its config.json.

    MXFP4 experts take 17 bytes for 32 values (16 of codes, one of scale); everything else takes the config's type.

    Args:
        path: config.json, or the directory that holds it.

    Raises:
        NotFoundError, InputError: no such file, a dense model, or a quantisation other than MXFP4, whose sizes
            depend on the shards.
    """
    import torch

    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: config.json of a model is expected.")
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    num_experts = expert_count(raw, family_of(raw))
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        raise InputError(f"the size of a {method!r} checkpoint is read from its shards, and {path.parent} has none.")
    config = AutoConfig.from_pretrained(path.parent)
    stated = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    item_bytes = _ITEM_BYTES.get(stated, 2)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    fixed = per_expert = 0
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        values = math.prod(tensor.shape)
        packed = method == "mxfp4" and _EXPERT_WEIGHT.search(name)
        num_bytes = values // 32 * 17 if packed else values * item_bytes
        if _is_per_expert(name, tuple(tensor.shape), num_experts):
            per_expert += num_bytes // num_experts
        else:
            fixed += num_bytes
    return CheckpointSize(fixed, per_expert, num_experts)


def _is_per_expert(name: str, shape: tuple[int, ...], num_experts: int) -> bool:
    inside = re.search(r"layers\.\d+\..*(\.experts\.|\.gate\.|\.router\.)", name)
    return bool(inside) and (shape[:1] == (num_experts,) or shape == (1, num_experts))
