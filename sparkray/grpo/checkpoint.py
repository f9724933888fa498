"""A checkpoint of training: the model in Hugging Face format, and beside it what a run needs to go on.

DIR/adapter/  or  DIR/model/   what transformers and peft load
DIR/trainer.pt                 optimizer, scheduler, random numbers
DIR/run.json                   step, weight version, and which model and settings it belongs to
"""

from __future__ import annotations

import errno
import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparkray.errors import UnavailableError, UsageError
from sparkray.grpo.policy import Policy

_RUN, _TRAINER = "run.json", "trainer.pt"
ADAPTER, MODEL = "adapter", "model"


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run is.

    Attributes:
        step: steps that are done; the next one has this number.
        weight_version: of the weights in this checkpoint.
        fixed: what a run that goes on must have in common with this one.
    """

    step: int
    weight_version: int
    fixed: Mapping[str, Any]


def save_checkpoint(
    folder: Path,
    policy: Policy,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: RunState,
    *,
    writes: bool,
) -> None:
    """Write a checkpoint into an empty folder. Under FSDP every rank calls this, and the one with `writes` writes.

    Raises:
        UnavailableError: the disk is full; checkpoints before this one are as they were.
    """
    if policy.sharded:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(policy.model, options=options)
        optimizer_state = get_optimizer_state_dict(policy.model, optimizer, options=options)
    else:
        weights, optimizer_state = None, optimizer.state_dict()
    if not writes:
        return
    try:
        policy.model.save_pretrained(str(folder / (ADAPTER if policy.adapter else MODEL)), state_dict=weights)
        if not policy.adapter:
            tokenizer.save_pretrained(str(folder / MODEL))
        torch.save(
            {
                "optimizer": optimizer_state,
                "scheduler": scheduler.state_dict(),
                "torch_rng": torch.get_rng_state(),
                "numpy_rng": np.random.get_state(),
                "python_rng": random.getstate(),
            },
            folder / _TRAINER,
        )
        (folder / _RUN).write_text(json.dumps(asdict(state)), encoding="utf-8")
    except OSError as failure:
        if failure.errno != errno.ENOSPC:
            raise
        raise UnavailableError(
            f"the disk was full while the checkpoint of step {state.step} was written to {folder}.",
            hint="Make room and start the run again: it goes on from the checkpoint before.",
        ) from failure


def read_state(folder: Path, fixed: Mapping[str, Any]) -> RunState:
    """Where the run of a checkpoint was.

    Raises:
        UsageError: it is of another model or other settings.
    """
    state = RunState(**json.loads((folder / _RUN).read_text(encoding="utf-8")))
    check_same_run(state.fixed, fixed, folder)
    return state


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings than before."""
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)
        raise UsageError(
            f"{folder} holds another run: {told}.",
            hint="Give these settings again to go on with it, or another run_name to start anew.",
            param=changed[0],
        )


def restore_trainer(
    folder: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """Put optimizer, scheduler and random numbers back as they were."""
    # Written by this package on this file system; it holds states of generators, which are no tensors.
    held = torch.load(folder / _TRAINER, map_location="cpu", weights_only=False)
    if policy.sharded:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        set_optimizer_state_dict(policy.model, optimizer, held["optimizer"], options=options)
    else:
        optimizer.load_state_dict(held["optimizer"])
    scheduler.load_state_dict(held["scheduler"])
    torch.set_rng_state(held["torch_rng"])
    np.random.set_state(held["numpy_rng"])
    random.setstate(held["python_rng"])


def export_model(model_path: Path, checkpoint: Path, into: Path, *, dtype: torch.dtype | None = None) -> Path:
    """A model that any engine serves: the adapter merged into the model, or the trained model itself.

    Args:
        model_path: the model that the adapter was trained on.
        checkpoint: a checkpoint's folder.
        into: written under another name first; must not exist or be empty.
        dtype: of the merged weights; by default float32, since a small delta is lost in bfloat16.

    Raises:
        UsageError: `into` holds something, or `checkpoint` holds neither an adapter nor a model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if into.exists() and any(into.iterdir()):
        raise UsageError(f"{into} is not empty, and a new folder is expected.", param="into")
    if (checkpoint / ADAPTER).is_dir():
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(str(model_path), dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(checkpoint / ADAPTER)).merge_and_unload()
    elif (checkpoint / MODEL).is_dir():
        model = AutoModelForCausalLM.from_pretrained(str(checkpoint / MODEL), dtype=torch.float32)
    else:
        raise UsageError(
            f"{checkpoint} is no checkpoint: it holds neither {ADAPTER}/ nor {MODEL}/.", param="checkpoint"
        )
    draft = into.with_name(f"{into.name}.tmp")
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(str(draft))
    AutoTokenizer.from_pretrained(str(model_path)).save_pretrained(str(draft))
    if into.exists():
        into.rmdir()
    draft.rename(into)
    return into


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of a run with the most steps, or None."""
    found = [(json.loads(path.read_text(encoding="utf-8"))["step"], path.parent) for path in run_dir.glob(f"*/{_RUN}")]
    return max(found)[1] if found else None
