"""A mixture of experts to try pruning on, made of a small dense model by upcycling (Komatsuzaki et al., 2212.05055).

Every expert of a layer starts as a copy of the layer's MLP, with a little noise of its own, under a random router.
Mixtral's gates sum to one, so the mixture answers nearly as the dense model does, and so does what is left of it.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparkray.errors import InputError, UsageError
from sparkray.pruning.whole_files import write_atomically

_MLP = re.compile(r"^(model\.layers\.\d+\.)mlp\.(gate|up|down)_proj\.weight$")
_MIXTRAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
_WEIGHTS = "model.safetensors"
_DROPPED_KEYS = ("architectures", "mlp_bias", "attention_bias", "pad_token_id")


def upcycle(source: Path, target: Path, *, num_experts: int = 4, top_k: int = 2, noise: float = 0.05) -> int:
    """Write a Mixtral checkpoint whose experts are noisy copies of a dense Llama's MLPs.

    Args:
        source: a Llama model in one safetensors file.
        target: the new directory; tokenizer and chat template come along.
        num_experts: experts of every layer.
        top_k: experts that a token is routed to.
        noise: standard deviation of the noise, as a share of the weights' own.

    Returns:
        Bytes of the tensors.

    Raises:
        InputError: another kind of model.
        UsageError: the target exists.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "llama" or not (source / _WEIGHTS).is_file():
        raise InputError(f"{source} is no Llama model in one {_WEIGHTS}.")
    if target.exists():
        raise UsageError(f"the output directory {target} exists.", hint="Name another one, or remove it.")
    building = target.with_name(f"{target.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    tensors = _tensors(source / _WEIGHTS, num_experts, noise)
    save_file(tensors, building / _WEIGHTS, metadata={"format": "pt"})
    edited = {key: value for key, value in config.items() if key not in _DROPPED_KEYS} | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    write_atomically(building / "config.json", (json.dumps(edited, indent=2) + "\n").encode())
    for path in source.iterdir():
        if path.is_file() and path.name not in ("config.json", _WEIGHTS, "sparkray-manifest.json"):
            write_atomically(building / path.name, path.read_bytes())
    building.replace(target)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tensors(path: Path, num_experts: int, noise: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            weight: torch.Tensor = file.get_tensor(name)
            match = _MLP.match(name)
            if match is None:
                tensors[name] = weight
                continue
            block = f"{match[1]}block_sparse_moe"
            spread = noise * weight.float().std()
            for expert in range(num_experts):
                shift = torch.randn(weight.shape, generator=generator) * spread
                noisy = (weight.float() + shift).to(weight.dtype)
                tensors[f"{block}.experts.{expert}.{_MIXTRAL_NAMES[match[2]]}.weight"] = noisy
            if match[2] == "gate":
                router = torch.randn(num_experts, weight.shape[1], generator=generator) * 0.1
                tensors[f"{block}.gate.weight"] = router.to(weight.dtype)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
    return tensors
