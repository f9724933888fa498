"""Watching a model's experts: norms come from the forward's own expert outputs, with the gates it uses.

Every family whose experts take (hidden states, expert ids, gates) is watched by an experts implementation that is
registered with transformers: the same grouped matrix products as `grouped_mm`, with three reductions on their way.
Llama 4 multiplies the gate into the input and needs a forward hook and the routed rows once more.

Shapes: T tokens of one forward, K experts a token, S = T * K routed rows, H hidden size, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from sparkray.config.pruning import GateSource
from sparkray.errors import InputError
from sparkray.pruning.families import ExpertsInterface
from sparkray.pruning.statistics import FIELDS, MAX_FIELDS, SUM_FIELDS, LayerStatistics, Statistics

_IMPLEMENTATION = "sparkray_observed"
_EXPERTS_MODULE = re.compile(r"layers\.(\d+)\.(?:.+\.)?experts$")


@dataclass(slots=True)
class _Routing:
    """The routed rows of one forward, sorted by expert."""

    expert_ids_S: torch.Tensor
    order_S: torch.Tensor  # row of the sorted list -> row of the flat (token, slot) list
    gates_S: torch.Tensor
    num_top_k: int

    @property
    def token_ids_S(self) -> torch.Tensor:  # noqa: N802 - the suffix is its shape
        return self.order_S // self.num_top_k


@dataclass(eq=False)
class ExpertObserver:
    """Collects statistics of every forward that runs inside `watching(...)`.

    Attributes:
        interface: how the family calls its experts (families.py).
        gate_source: `model` takes the gates that the model multiplies with. `upstream` reproduces the published
            observer: top-k of the raw logits, softmax over all of them.
        renormalize_upstream: with upstream gates, whether they are renormalised over the top-k.
    """

    model: torch.nn.Module
    interface: ExpertsInterface = "routed"
    gate_source: GateSource = "model"
    renormalize_upstream: bool = True
    _modules: dict[int, str] = field(default_factory=dict, init=False)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    _num_tokens: dict[str, int] = field(default_factory=dict, init=False)
    _valid_T: torch.Tensor | None = field(default=None, init=False)
    _logits: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    _hooks: list[Any] = field(default_factory=list, init=False)

    def __enter__(self) -> ExpertObserver:
        ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, self._experts_forward)
        for name, module in self.model.named_modules():
            match = _EXPERTS_MODULE.search(name)
            if match is None or not hasattr(module, "down_proj"):
                continue
            self._modules[id(module)] = match[1]
            block = self.model.get_submodule(name.rsplit(".", 1)[0])
            if self.interface == "gated_input":
                _GatedInputWatch(self, block, module, match[1])
            else:
                module.config._experts_implementation = _IMPLEMENTATION
                if self.gate_source == "upstream":
                    self._keep_logits(block, module)
        if not self._modules:
            raise InputError("the model has no fused experts module: a mixture of experts is expected.")
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def watching(self, mask_BT: torch.Tensor | None) -> Iterator[None]:
        """Forwards inside count the tokens where `mask_BT` is non-zero, or all without a mask."""
        self._valid_T = None if mask_BT is None or bool(mask_BT.all()) else mask_BT.reshape(-1).bool()
        try:
            yield
        finally:
            self._valid_T = None

    def take(self) -> Statistics:
        """What was collected since the last call."""
        statistics = Statistics()
        for layer, sums in self._sums.items():
            values = {name: array.astype(np.float64) for name, array in zip(FIELDS, sums.cpu().numpy(), strict=True)}
            statistics[layer] = LayerStatistics(self._num_tokens[layer], values)
        self._sums.clear()
        self._num_tokens.clear()
        return statistics

    # ---------------------------------------------------------------- what the forward calls

    def _experts_forward(
        self, module: Any, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, gates_TK: torch.Tensor
    ) -> torch.Tensor:
        layer = self._modules[id(module)]
        routing = _sort_routing(ids_TK, gates_TK)
        outputs_SH = _expert_outputs(module, hidden_TH, routing)
        if self.gate_source == "model":
            self._record(layer, module.num_experts, hidden_TH.shape[0], routing, outputs_SH)
        else:
            self._record_upstream(layer, module, hidden_TH, ids_TK.shape[-1])
        weighted_SH = outputs_SH * routing.gates_S.unsqueeze(-1)
        back_S = torch.empty_like(routing.order_S)
        back_S[routing.order_S] = torch.arange(len(back_S), device=back_S.device)
        summed_TH = weighted_SH[back_S].view(*ids_TK.shape, -1).sum(dim=1)
        return summed_TH.to(hidden_TH.dtype)

    def _record_upstream(self, layer: str, module: Any, hidden_TH: torch.Tensor, num_top_k: int) -> None:
        logits_TE = self._logits.pop(id(module))
        ids_TK = logits_TE.topk(num_top_k, dim=-1).indices
        gates_TK = logits_TE.float().softmax(dim=-1).gather(1, ids_TK)
        if self.renormalize_upstream:
            gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        routing = _sort_routing(ids_TK, gates_TK)
        outputs_SH = _expert_outputs(module, hidden_TH, routing)
        self._record(layer, module.num_experts, hidden_TH.shape[0], routing, outputs_SH)

    def _keep_logits(self, block: torch.nn.Module, experts: torch.nn.Module) -> None:
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        if router is None:
            raise InputError(f"{type(block).__name__} has no gate or router, so upstream's gates cannot be taken.")

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            self._logits[id(experts)] = output[0]

        self._hooks.append(router.register_forward_hook(keep))

    def _record(
        self,
        layer: str,
        num_experts: int,
        num_tokens: int,
        routing: _Routing,
        outputs_SH: torch.Tensor,
        contribution_S: torch.Tensor | None = None,
    ) -> None:
        """Add the routed rows of one forward to the layer's sums, float64 [fields, E] on the forward's device."""
        ids_S, gates_S = routing.expert_ids_S, routing.gates_S
        if self._valid_T is not None:
            num_tokens = int(self._valid_T.sum())
            kept_S = self._valid_T[routing.token_ids_S].nonzero(as_tuple=True)[0]
            ids_S, gates_S, outputs_SH = ids_S[kept_S], gates_S[kept_S], outputs_SH[kept_S]
            contribution_S = None if contribution_S is None else contribution_S[kept_S]
        self._num_tokens[layer] = self._num_tokens.get(layer, 0) + num_tokens
        lengths_E = torch.bincount(ids_S, minlength=num_experts)
        wide = outputs_SH if outputs_SH.dtype in (torch.float32, torch.float64) else outputs_SH.float()
        norms_S = torch.linalg.vector_norm(wide, dim=-1).double()
        low_S, high_S = (edge.double() for edge in torch.aminmax(wide, dim=-1))
        gates_S = gates_S.double()
        gated_S = gates_S * norms_S
        added_S = gated_S.abs() if contribution_S is None else contribution_S.double()
        columns = torch.stack(
            (torch.ones_like(norms_S), norms_S, norms_S**2, gated_S, gated_S**2, gates_S, added_S), dim=-1
        )
        sums = torch.segment_reduce(columns, "sum", lengths=lengths_E, axis=0, initial=0)
        edges = torch.stack((high_S, torch.maximum(low_S.abs(), high_S.abs())), dim=-1)
        maxima = torch.segment_reduce(edges, "max", lengths=lengths_E, axis=0, initial=0)
        part = torch.cat((sums, maxima), dim=-1).T
        total = self._sums.setdefault(layer, torch.zeros_like(part))
        total[: len(SUM_FIELDS)] += part[: len(SUM_FIELDS)]
        torch.maximum(total[-len(MAX_FIELDS) :], part[-len(MAX_FIELDS) :], out=total[-len(MAX_FIELDS) :])


class _GatedInputWatch:
    """Llama 4: the router gives a gate for every expert (zero where not routed) that multiplies the input.

    The norm of f(x) needs the routed rows once more without their gate: top-k of the E rows that the model itself
    computes for each token. What is added to the residual stream is read from the forward's own output.
    """

    def __init__(self, observer: ExpertObserver, block: Any, experts: Any, layer: str) -> None:
        self.observer = observer
        self.layer = layer
        self.scores_TE: torch.Tensor | None = None
        self.hidden_TH: torch.Tensor | None = None
        self.num_top_k = int(block.top_k)
        observer._hooks += [
            block.router.register_forward_hook(self._keep_scores),
            experts.register_forward_hook(self._record),
        ]

    def _keep_scores(self, _module: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        self.hidden_TH = inputs[0]
        self.scores_TE = output[0] if self.observer.gate_source == "model" else self._upstream(output[1])

    def _upstream(self, logits_TE: torch.Tensor) -> torch.Tensor:
        gates_TE = logits_TE.float().softmax(dim=-1)
        ids_TK = logits_TE.topk(self.num_top_k, dim=-1).indices
        return torch.zeros_like(gates_TE).scatter_(1, ids_TK, gates_TE.gather(1, ids_TK))

    def _record(self, experts: Any, _inputs: Any, output: torch.Tensor) -> None:
        assert self.scores_TE is not None and self.hidden_TH is not None
        hidden_TH, num_tokens = self.hidden_TH, self.hidden_TH.shape[0]
        gates_TK, ids_TK = self.scores_TE.topk(self.num_top_k, dim=-1)
        routing = _sort_routing(ids_TK, gates_TK)
        added_ETH = output.view(experts.num_experts, num_tokens, -1)
        added_SH = added_ETH[routing.expert_ids_S, routing.token_ids_S]
        lengths = torch.bincount(routing.expert_ids_S, minlength=experts.num_experts).tolist()
        rows = []
        for expert, hidden_RH in enumerate(torch.split(hidden_TH[routing.token_ids_S], lengths)):
            gate_RI, up_RI = (hidden_RH @ experts.gate_up_proj[expert]).chunk(2, dim=-1)
            rows.append((up_RI * experts.act_fn(gate_RI)) @ experts.down_proj[expert])
        contribution_S = torch.linalg.vector_norm(added_SH.float(), dim=-1)
        self.observer._record(self.layer, experts.num_experts, num_tokens, routing, torch.cat(rows), contribution_S)
        self.scores_TE = self.hidden_TH = None


def _sort_routing(ids_TK: torch.Tensor, gates_TK: torch.Tensor) -> _Routing:
    ids_S, order_S = torch.sort(ids_TK.reshape(-1))
    return _Routing(ids_S, order_S, gates_TK.reshape(-1)[order_S], ids_TK.shape[-1])


def _expert_outputs(module: Any, hidden_TH: torch.Tensor, routing: _Routing) -> torch.Tensor:
    """f(x) of every routed row, unweighted, sorted by expert: [S, H]; the products that `grouped_mm` runs."""
    ids_S = routing.expert_ids_S
    offsets_E = torch.bincount(ids_S, minlength=module.num_experts).cumsum(0, dtype=torch.int32)
    hidden_SH = hidden_TH[routing.token_ids_S]
    first = module.gate_up_proj if module.has_gate else module.up_proj
    bias_name = "gate_up_proj_bias" if module.has_gate else "up_proj_bias"
    bias = getattr(module, bias_name)[ids_S] if module.has_bias else None
    inner = _grouped_linear(hidden_SH, first, offsets_E, bias=bias, is_transposed=module.is_transposed)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    bias = module.down_proj_bias[ids_S] if module.has_bias else None
    outputs: torch.Tensor = _grouped_linear(
        inner, module.down_proj, offsets_E, bias=bias, is_transposed=module.is_transposed
    )
    return outputs
