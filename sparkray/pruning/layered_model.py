"""A transformers model whose layers are loaded from the shards one by one, run, and let go.

The model is built without memory (on torch's `meta` device). Embeddings, norm and head are read at once; a decoder
layer is read when it is needed, through transformers' own key conversion, so that every family loads as
`from_pretrained` would. Quantised tensors arrive as dense ones (tensors.py).

One step is one layer over one micro-batch: the model's own forward is run with the layers before it passed over and
the hidden states of the step put in their place. Masks and rotary tables are the model's own, and nothing but hidden
states is kept between steps.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from sparkray.config.pruning import DtypeName
from sparkray.errors import InputError, UnavailableError, UsageError
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.families import text_config
from sparkray.pruning.layout import layer_of
from sparkray.pruning.tensors import dense_tensors


class _StepDone(Exception):  # noqa: N818 - a way out of the model's forward, not an error
    """The layer of the step has run; the rest of the forward is not needed."""


class LayeredModel:
    """One model directory, with as many layers in memory as the caller asks for.

    Args:
        checkpoint: an opened model directory.
        dtype: type of the forward.
        device: torch device of the forward.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = open_device(device)
        config = AutoConfig.from_pretrained(checkpoint.directory)
        # The weights arrive dense, so transformers must not look for a quantiser.
        for part in (config, config.get_text_config()):
            part.__dict__.pop("quantization_config", None)
        with torch.device("meta"), _quiet():
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self._layers_path = _find_layers(self.model)
        self.layers: Any = self.model.get_submodule(self._layers_path)
        self._stack = self._disk_stack()
        self._names = self._names_by_layer()
        self._conversions = get_model_conversion_mapping(self.model)
        self._step_layer: int | None = None
        self._step_hidden: torch.Tensor | None = None
        for number, layer in enumerate(self.layers):
            layer.forward = self._stepping(number, layer.forward)
        self._load(self._names[-1])
        self.model.tie_weights()
        self._fill_computed_buffers()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def load_layers(self, numbers: Sequence[int]) -> None:
        """Read decoder layers into memory.

        Raises:
            InputError: the checkpoint lacks a tensor that the layer needs.
        """
        for number in numbers:
            self._load(self._names.get(number, []))
            absent = [name for name, tensor in self.layers[number].state_dict().items() if tensor.is_meta]
            if absent:
                raise InputError(
                    f"layer {number} of {self.checkpoint.directory} lacks {len(absent)} tensors, the first"
                    f" {absent[0]!r}: the checkpoint is not complete, or its layout is not known to transformers."
                )
            _return_memory()

    def free_layer(self, number: int) -> None:
        """Let go of a layer's parameters."""
        for module in self.layers[number].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        _return_memory()

    @torch.no_grad()
    def step(
        self, number: int, ids_BT: torch.Tensor, mask_BT: torch.Tensor, hidden_BTH: torch.Tensor | None
    ) -> torch.Tensor:
        """Hidden states after layer `number`; `hidden_BTH` are those before it, None for the first layer."""
        self._step_layer, self._step_hidden = number, hidden_BTH
        try:
            self._forward(ids_BT, mask_BT)
        except _StepDone:
            assert self._step_hidden is not None
            return self._step_hidden
        finally:
            self._step_layer = self._step_hidden = None
        raise InputError(f"the forward of {type(self.model).__name__} never reached layer {number}.")

    @torch.no_grad()
    def logits_from(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of hidden states that have gone through all layers: the model's own norm and head."""
        self._step_layer, self._step_hidden = self.num_layers, hidden_BTH
        try:
            logits: torch.Tensor = self._forward(ids_BT, mask_BT).logits
            return logits
        finally:
            self._step_layer = self._step_hidden = None

    @torch.no_grad()
    def run(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of a plain forward; all layers must be loaded."""
        logits: torch.Tensor = self._forward(ids_BT, mask_BT).logits
        return logits

    def _forward(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Any:
        return self.model(input_ids=ids_BT.to(self.device), attention_mask=mask_BT.to(self.device), use_cache=False)

    def _stepping(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(hidden_BTH: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            target = self._step_layer
            if target is None:
                return forward(hidden_BTH, *args, **kwargs)
            if number == target:
                before = hidden_BTH if self._step_hidden is None else self._step_hidden
                after = forward(before, *args, **kwargs)
                self._step_hidden = after[0] if isinstance(after, tuple) else after
                raise _StepDone
            return self._step_hidden if number == self.num_layers - 1 else hidden_BTH

        return stepped

    def _load(self, names: list[str]) -> None:
        config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self._conversions,
            device_map={"": self.device},
        )
        tensors = dense_tensors(self.checkpoint, names, self.dtype)
        with _one_tensor_at_a_time(), _quiet():
            info, _ = convert_and_load_state_dict_in_model(self.model, tensors, config)
        if info.mismatched_keys:
            name, found, expected = sorted(info.mismatched_keys, key=str)[0]
            raise InputError(
                f"{name!r} has the shape {tuple(found)} in {self.checkpoint.directory}, and its config.json says"
                f" {tuple(expected)}."
            )

    def _fill_computed_buffers(self) -> None:
        """Compute what no shard holds (rotary frequencies), as from_pretrained does after loading."""
        self.model._move_missing_keys_from_meta_to_device(set(), {"": self.device}, None, None)
        self.model._initialize_missing_keys(False)

    def _disk_stack(self) -> str:
        prefix = f"{self.checkpoint.family.block}.experts."
        num_layers = int(text_config(self.checkpoint.config, self.checkpoint.family)["num_hidden_layers"])
        for name in self.checkpoint.tensors:
            place = layer_of(name)
            if place and place[2].startswith(prefix) and place[1] < num_layers and "mtp" not in place[0]:
                return place[0]
        raise InputError(f"{self.checkpoint.directory} has no layer with experts.")

    def _names_by_layer(self) -> dict[int, list[str]]:
        """Layer number -> tensor names; -1 holds what belongs to no decoder layer."""
        names: dict[int, list[str]] = {-1: []}
        for name in self.checkpoint.tensors:
            place = layer_of(name)
            number = place[1] if place and place[0] == self._stack else -1
            names.setdefault(number, []).append(name)
        return names


def resolve_dtype(name: DtypeName, checkpoint: Checkpoint) -> torch.dtype:
    """`auto` is the type that config.json names, or bfloat16."""
    if name == "auto":
        config = checkpoint.config
        nested = text_config(config, checkpoint.family)
        stated = config.get("dtype") or config.get("torch_dtype") or nested.get("dtype") or nested.get("torch_dtype")
        name = stated if stated in ("float32", "bfloat16", "float16") else "bfloat16"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def open_device(name: str) -> torch.device:
    """The torch device of that name.

    Raises:
        UsageError: torch knows no such name.
        UnavailableError: this machine, or this build of torch, has none.
    """
    try:
        device = torch.device(name)
    except RuntimeError as failure:
        raise UsageError(
            f"{name!r} is no device of torch.", hint="Say `cpu`, `cuda`, or `cuda:1` for the second GPU."
        ) from failure
    try:
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as failure:
        raise UnavailableError(
            f"the device {name!r} cannot be used here: {str(failure).splitlines()[0]}.",
            hint="Take --device cpu, or install torch for that device.",
        ) from failure
    return device


def _find_layers(model: Any) -> str:
    for name, _ in model.named_modules():
        if name.endswith(".experts") and ".layers." in name:
            return str(name[: name.index(".layers.") + len(".layers")])
    raise InputError(f"{type(model).__name__} has no decoder layer with experts: a mixture of experts is expected.")


def _return_memory() -> None:
    # Tensors under 32 MB come from glibc's heap, where small leftovers between them keep every layer's pages for good.
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    # transformers reads all tensors ahead in threads; one at a time halves the memory of a layer.
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _quiet() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
