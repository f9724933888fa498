"""The receiving end of a push inside vLLM's worker: a weight-transfer engine of vLLM's own registry.

It reloads the layers that came, and then prepares a tied head anew: on CPUs vLLM keeps a packed copy of the head that
a reload of the embedding does not touch, so the head would stay old while everything reports the new version.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "sparkray_object_store"


@dataclass
class NothingToInit(WeightTransferInitInfo):
    """There is no connection to open."""


@dataclass
class FromFile(WeightTransferUpdateInfo):
    """Tensors in a safetensors file of this host's shared memory."""

    path: str


class ObjectStoreEngine(WeightTransferEngine[NothingToInit, FromFile]):
    """Loads tensors that Ray's object store brought to this host."""

    init_info_cls = NothingToInit
    update_info_cls = FromFile

    def init_transfer_engine(self, init_info: NothingToInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own waits for the accelerator, and torch raises where there is none.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: FromFile) -> None:
        self.model.load_weights(load_file(update_info.path).items())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        prepare_tied_head(self.model)

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Mixed into vLLM's worker; loading this module there is what registers the engine."""


def prepare_tied_head(model: Any) -> None:
    """Pack the head's weights anew from the parameter that it shares with the embedding."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


def write_shared(payload: bytes, name: str) -> Path:
    """Put a payload where the engine's worker, another process of this host, can read it."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    path = folder / f"sparkray-weights-{os.getpid()}-{name}.safetensors"
    path.write_bytes(payload)
    return path


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, __name__, "ObjectStoreEngine")
