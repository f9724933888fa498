"""The model that is trained: loading it, what of it is trained, and which tensors changed.

What is trained is kept in float32 in every method, so its steps are never rounded away; with `bf16` the forward
computes in bfloat16 from it, and frozen weights are stored in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkray.config.grpo import GrpoConfig
from sparkray.errors import InputError, MissingExtraError, UnavailableError
from sparkray.grpo.packing import Completion, PackedBatch, build_batch, plan_batches
from sparkray.grpo.scoring import Scorer

_ADAPTER_PREFIX = "base_model.model."
# vLLM joins these into one matrix and takes it only as a whole, so they are pushed together.
_FUSED_PARENTS = ("self_attn", "mlp")
_SAME_PACKED = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """A loaded model.

    Attributes:
        model: of transformers, or of peft around it.
        scorer: the same as a function of completions.
        device: where it is.
        adapter: whether an adapter is trained and the rest frozen.
        sharded: whether FSDP holds it in parts.
    """

    model: Any
    scorer: Scorer
    device: torch.device
    adapter: bool
    bf16: bool
    sharded: bool = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def changed_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Name and value, as a checkpoint of the plain model has them, of every tensor that training may change.

        An adapter is merged into copies. Under FSDP every rank must iterate: each value is gathered from all.
        """
        if not self.adapter:
            for name, parameter in self.model.named_parameters():
                yield name, _whole(parameter).detach().to(dtype)
            return
        from peft.tuners.lora import LoraLayer

        named = dict(self.model.named_modules())
        changed = {name for name, module in named.items() if isinstance(module, LoraLayer)}
        parents = {name.rpartition(".")[0] for name in changed}
        fused = {parent for parent in parents if parent.rpartition(".")[2] in _FUSED_PARENTS}
        for name, parameter in self.model.named_parameters():
            owner, _, kind = name.rpartition(".")
            owner = owner.removesuffix(".base_layer")
            if ".lora_" in name or not (owner in changed or owner.rpartition(".")[0] in fused):
                continue
            value = _whole(parameter).detach().float()
            if kind == "weight" and owner in changed:
                value = value + _whole(named[owner].get_delta_weight("default")).detach().float()
            yield f"{owner.removeprefix(_ADAPTER_PREFIX)}.{kind}", value.to(dtype)

    def adapter_weights(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names that peft stores."""
        from peft import get_peft_model_state_dict

        return {name: _whole(value).detach().cpu() for name, value in get_peft_model_state_dict(self.model).items()}

    def reference(self) -> Callable[[PackedBatch], Tensor]:
        """Log-probabilities under the weights that training started from.

        Raises:
            InputError: full fine-tuning, where those weights are gone.
        """
        if not self.adapter:
            raise InputError(
                "loss.kl_beta is above 0, and with method 'full' the weights that training started from are not kept.",
                hint="Train an adapter, or set loss.kl_beta to 0.",
                param="loss.kl_beta",
            )

        @torch.no_grad()
        def score(batch: PackedBatch) -> Tensor:
            with self.model.disable_adapter(), self.autocast():
                logprobs_N: Tensor = self.scorer(batch)[0]
            return logprobs_N

        return score

    @torch.no_grad()
    def score_text(self, token_ids: tuple[int, ...]) -> Tensor:
        """[T - 1] log-probabilities of a text after its first token, at temperature 1."""
        one = [Completion(0, token_ids[:1], token_ids[1:])]
        batch = build_batch(plan_batches(one, max_tokens=len(token_ids), packing="plain")[0], one).to(self.device)
        before, self.scorer.temperature = self.scorer.temperature, 1.0
        try:
            with self.autocast():
                logprobs_N: Tensor = self.scorer(batch)[0]
        finally:
            self.scorer.temperature = before
        return logprobs_N.float().cpu()


def load_policy(path: Path, config: GrpoConfig, device: torch.device, *, adapter_from: Path | None = None) -> Policy:
    """Load a model for training.

    Args:
        path: directory of the model; with full fine-tuning a checkpoint's.
        config: of the run.
        device: where it goes.
        adapter_from: directory of an adapter to go on with.

    Raises:
        MissingExtraError: peft, or for `qlora` bitsandbytes, is not installed.
        UnavailableError: `qlora` without a CUDA device.
    """
    from transformers import AutoModelForCausalLM

    # Adapters start from random numbers, and every rank must draw the same.
    torch.manual_seed(config.seed)
    frozen = config.method != "full"
    stored = torch.bfloat16 if config.bf16 and frozen else torch.float32
    arguments: dict[str, Any] = {"dtype": stored, "attn_implementation": "sdpa"}
    if config.method == "qlora":
        arguments |= _four_bits(device)
    model = AutoModelForCausalLM.from_pretrained(str(path), **arguments)
    if config.method != "qlora":
        model = model.to(device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if frozen:
        model = _with_adapter(model, config, adapter_from)
    # Dropout would make the log-probabilities at the start of a step differ from those of the engine.
    model.eval()
    policy = Policy(model, Scorer(model, temperature=config.temperature), device, frozen, config.bf16)
    if config.packing == "shared_prefix":
        _check_packing(policy)
    return policy


def shard(policy: Policy, *, num_ranks: int) -> Policy:
    """Cut the model over all ranks (FSDP2): each layer is gathered when it computes and let go after."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(policy.device.type, (num_ranks,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if policy.bf16 else None, reduce_dtype=torch.float32)
    causal = policy.model.get_base_model() if policy.adapter else policy.model
    modules = [*causal.get_decoder().layers, policy.scorer]
    for module in modules:
        # A step's loss is already divided by the counts of all ranks: gradients are added, not averaged.
        part = fully_shard(module, mesh=mesh, mp_policy=precision)
        part.set_gradient_divide_factor(1.0)
        # A factor of one is a plain sum, which gloo has; the scaled one that FSDP would take it has not.
        part.set_force_sum_reduction_for_comms(True)
    return Policy(policy.model, policy.scorer, policy.device, policy.adapter, policy.bf16, sharded=True)


def _whole(tensor: Tensor) -> Tensor:
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def _with_adapter(model: Any, config: GrpoConfig, adapter_from: Path | None) -> Any:
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ModuleNotFoundError as failure:
        raise MissingExtraError.for_module("peft", "train") from failure
    if adapter_from is not None:
        return PeftModel.from_pretrained(model, str(adapter_from), is_trainable=True)
    layers = list(range(*config.lora_layers)) if config.lora_layers is not None else None
    num_layers = model.config.num_hidden_layers
    if layers is not None and (not layers or layers[-1] >= num_layers):
        raise InputError(
            f"lora_layers is {config.lora_layers}, and the model has layers 0 to {num_layers - 1}.", param="lora_layers"
        )
    adapter = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.lora_targets),
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def _four_bits(device: torch.device) -> dict[str, Any]:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise MissingExtraError.for_module("bitsandbytes", "train")
    if device.type != "cuda":
        raise UnavailableError(
            f"method 'qlora' was given, and its 4-bit kernels need a CUDA device; this rank has {device.type}.",
            hint="Use method 'lora' here.",
        )
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    return {"quantization_config": quantised, "device_map": {"": device}}


def _check_packing(policy: Policy) -> None:
    """Compare packed rows with plain ones: a model with recurrent layers would mix completions up."""
    completions = [Completion(0, (1, 2, 3), (4, 5)), Completion(0, (1, 2, 3), (6, 7, 8))]
    found = []
    for packing in ("shared_prefix", "plain"):
        rows = plan_batches(completions, max_tokens=64, packing=packing)[0]
        batch = build_batch(rows, completions).to(policy.device)
        with torch.no_grad():
            logprobs_BT = batch.to_completions(policy.scorer(batch)[0].float())
        found.append(logprobs_BT[torch.tensor(batch.completions, device=policy.device).argsort()])
    tolerance = 0.1 if policy.bf16 else _SAME_PACKED
    gap = (found[0] - found[1]).abs().max().item()
    if gap > tolerance:
        raise InputError(
            f"this model gives other log-probabilities where completions share their prompt (by {gap:.2g}).",
            hint="Its tokens do not meet in causal attention alone: set packing to 'plain'.",
            param="packing",
        )
