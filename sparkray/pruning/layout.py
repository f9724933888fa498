"""Which tensors of a checkpoint belong to experts, which to routers, and what is refused because it is not known."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sparkray.errors import InputError
from sparkray.pruning.checkpoint import Checkpoint, TensorEntry
from sparkray.pruning.families import Family, expert_count, text_config

Role = Literal["other", "expert", "stacked", "router"]

_LAYER = re.compile(r"^(?P<stack>.*?)layers\.(?P<layer>\d+)\.(?P<rest>.+)$")
_NUMBERED = re.compile(r"^(\d+)\.(.+)$")
# Experts that every token visits are not routed: shared_expert, shared_experts, share_expert, shared_mlp.
_SHARED = re.compile(r"(^|\.)shared?_(expert|experts|mlp|expert_gate)(\.|$)")


@dataclass(frozen=True, slots=True)
class TensorRole:
    """What one tensor is to a prune.

    Attributes:
        role: `expert` belongs to the one expert `expert`; `stacked` and `router` have one row an expert along
            `axis`; `other` is copied.
        layer: id of the sparse layer: "3", or "mtp.0" for a prediction layer outside of the main stack.
    """

    role: Role
    layer: str = ""
    expert: int = -1
    axis: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """The roles of all tensors of a checkpoint.

    Attributes:
        num_experts: experts of every sparse layer.
        layers: ids of the sparse layers that a forward pass visits, in order.
        mtp_layers: ids of multi-token-prediction layers, which have experts and are not part of the forward.
    """

    num_experts: int
    layers: tuple[str, ...]
    mtp_layers: tuple[str, ...]
    roles: dict[str, TensorRole]


def layer_of(name: str) -> tuple[str, int, str] | None:
    """(stack, layer number, rest) of a tensor name such as `model.layers.3.mlp.gate.weight`, or None."""
    match = _LAYER.match(name)
    return (match["stack"], int(match["layer"]), match["rest"]) if match else None


def layer_id(stack: str, layer: int) -> str:
    """Id of a layer: its number, with `mtp.` before it in a stack of prediction layers."""
    return f"mtp.{layer}" if "mtp" in stack else str(layer)


def read_layout(checkpoint: Checkpoint) -> Layout:
    """Find the experts and router rows of a checkpoint.

    Raises:
        InputError: a dense checkpoint, a layer with another number of experts than the config says, or a
            tensor that looks as if it had one row an expert and is not known, by name.
    """
    family = checkpoint.family
    num_experts = expert_count(checkpoint.config, family)
    num_layers = int(text_config(checkpoint.config, family)["num_hidden_layers"])
    sparse = _sparse_layers(checkpoint, family)
    if not sparse:
        raise InputError(
            f"no tensor of {checkpoint.directory} is named as an expert of a {family.model_type} model"
            f" (layers.N.{family.block}.experts...): a mixture of experts is expected."
        )
    roles = {name: _role(tensor, family, num_experts, sparse) for name, tensor in checkpoint.tensors.items()}
    _check_complete(roles, num_experts)
    ordered = sorted(sparse, key=lambda key: key[1])
    main = tuple(layer_id(*key) for key in ordered if _is_main(key, num_layers))
    mtp = tuple(layer_id(*key) for key in ordered if not _is_main(key, num_layers))
    return Layout(num_experts, main, mtp, roles)


def _is_main(key: tuple[str, int], num_layers: int) -> bool:
    return "mtp" not in key[0] and key[1] < num_layers


def _sparse_layers(checkpoint: Checkpoint, family: Family) -> set[tuple[str, int]]:
    prefix = f"{family.block}.experts."
    found = set()
    for name in checkpoint.tensors:
        place = layer_of(name)
        if place is not None and place[2].startswith(prefix):
            found.add(place[:2])
    return found


def _role(tensor: TensorEntry, family: Family, num_experts: int, sparse: set[tuple[str, int]]) -> TensorRole:
    place = layer_of(tensor.name)
    if place is None or place[:2] not in sparse:
        if "expert" in tensor.name and not _SHARED.search(tensor.name):
            raise _unknown(tensor, "it is outside of the sparse layers")
        return TensorRole("other")
    layer = layer_id(*place[:2])
    rest = place[2]
    inside = rest.removeprefix(f"{family.block}.")
    if inside == rest:
        if "expert" in rest and not _SHARED.search(rest):
            raise _unknown(tensor, f"it is outside of {family.block!r}")
        return TensorRole("other")
    if inside.startswith("experts."):
        return _expert_role(tensor, layer, inside.removeprefix("experts."), num_experts)
    if inside in family.router:
        return TensorRole("router", layer, axis=_row_axis(tensor, num_experts))
    if _SHARED.search(inside):
        return TensorRole("other")
    router_modules = {name.rsplit(".", 1)[0] + "." for name in family.router if "." in name}
    rows = num_experts in tensor.shape[:1] or (len(tensor.shape) == 2 and tensor.shape == (1, num_experts))
    if rows or "expert" in inside or any(inside.startswith(module) for module in router_modules):
        raise _unknown(tensor, f"a {family.model_type} model is not known to have it")
    return TensorRole("other")


def _expert_role(tensor: TensorEntry, layer: str, inside: str, num_experts: int) -> TensorRole:
    numbered = _NUMBERED.match(inside)
    if numbered:
        return TensorRole("expert", layer, expert=int(numbered[1]))
    if tensor.shape[:1] == (num_experts,):
        return TensorRole("stacked", layer)
    if tensor.shape in ((), (1,)):
        return TensorRole("other")  # one scale for all experts
    raise _unknown(tensor, f"its first dimension is not the {num_experts} experts of the config")


def _row_axis(tensor: TensorEntry, num_experts: int) -> int:
    if tensor.shape[:1] == (num_experts,):
        return 0
    if tensor.shape == (1, num_experts):
        return 1
    raise _unknown(tensor, f"a router tensor with {num_experts} rows is expected")


def _unknown(tensor: TensorEntry, reason: str) -> InputError:
    return InputError(
        f"the tensor {tensor.name!r} of shape {list(tensor.shape)} looks as if it belonged to experts, and {reason}.",
        hint="Cutting experts without it would break the model; describe it in sparkray/pruning/families.py.",
    )


def _check_complete(roles: dict[str, TensorRole], num_experts: int) -> None:
    experts: dict[str, set[int]] = {}
    for role in roles.values():
        if role.role == "expert":
            experts.setdefault(role.layer, set()).add(role.expert)
    for layer, found in experts.items():
        if found != set(range(num_experts)):
            raise InputError(
                f"layer {layer} holds {len(found)} experts numbered up to {max(found)}, and the config says"
                f" {num_experts}.",
                hint="A shard is missing, or the config is another model's.",
            )
