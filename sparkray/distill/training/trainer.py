"""The loop of one worker; the same class runs alone and as one of several.

A step draws its global batch from the step's number, takes its rank's share, adds gradients over micro-batches, sums
them over workers, and divides by the rows of the whole batch. So the loss of a step depends on the step alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparkray.config.distill import TrainConfig
from sparkray.distill.data.pack import Pack
from sparkray.distill.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sparkray.distill.training.memory import memory_report
from sparkray.distill.training.objective import Objective
from sparkray.distill.training.order import batch_of_step, learning_rate, share_of_rank
from sparkray.distill.training.supervision import Supervision
from sparkray.errors import InternalError


class Workers(Protocol):
    """The other workers of a run."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum_gradients(self, model: nn.Module) -> None:
        """Add every gradient over the workers, in place."""

    def sum(self, values: Tensor) -> Tensor:
        """Add values over the workers."""


class Alone:
    """No other workers."""

    rank = 0
    world_size = 1

    def sum_gradients(self, model: nn.Module) -> None:
        pass

    def sum(self, values: Tensor) -> Tensor:
        return values


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step: losses are means over the rows of the global batch, in nats."""

    step: int
    loss: float
    cross_entropy: float
    distillation: float
    gradient_norm: float
    learning_rate: float
    num_rows: int
    seconds: float
    waited_seconds: float


class Trainer:
    """Trains a student of either kind.

    Args:
        student: on its device already.
        pack: its training part is learnt.
        supervision: gives the teacher's rows.
        objective: what is minimised.
        train: settings.
        run: what the run is, for its checkpoints: hashes of data, store and settings.
        workers: the others.
    """

    def __init__(
        self,
        student: nn.Module,
        pack: Pack,
        supervision: Supervision,
        objective: Objective,
        train: TrainConfig,
        run: dict[str, Any],
        workers: Workers | None = None,
    ) -> None:
        self.student = student
        self.workers = workers or Alone()
        self.step = 0
        self._pack = pack
        self._supervision = supervision
        self._objective = objective
        self._train = train
        self._run = run
        self._device = next(student.parameters()).device
        self._optimizer = torch.optim.AdamW(
            _parameter_sets(student, train.weight_decay), lr=train.learning_rate, betas=(0.9, 0.95), fused=True
        )
        student.train()

    def run_step(self) -> StepReport:
        """One optimizer step.

        Raises:
            InternalError: a loss that is not finite; nothing was updated.
        """
        begun, waited = time.monotonic(), 0.0
        numbers = self._numbers(self.step)
        sums = torch.zeros(3, dtype=torch.float64)
        self._optimizer.zero_grad(set_to_none=True)
        everyone = batch_of_step(self.step, len(self._pack.train), self._train)
        num_rows = sum(self._objective.num_rows(self._pack.train, number) for number in everyone)
        # After the last step nobody needs rows, and a host may charge for them.
        following = self._numbers(self.step + 1) if self.step + 1 < self._train.num_steps else []
        size = self._train.micro_batch_sequences
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            asked = time.monotonic()
            scores = self._supervision.rows(part, [*numbers[start + size :], *following])
            waited += time.monotonic() - asked
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._train.precision == "bfloat16"):
                losses = self._objective.losses(self.student, self._pack.train, part, scores, self._device)
            torch.autograd.backward(losses.total / num_rows)
            sums += torch.stack([losses.total.detach(), losses.cross_entropy, losses.distillation]).double().cpu()
        self.workers.sum_gradients(self.student)
        sums = self.workers.sum(sums) / num_rows
        if not torch.isfinite(sums).all():
            raise InternalError(
                f"the loss of step {self.step + 1} is {sums[0].item()}.",
                hint="Lower train.learning_rate, or look at the teacher's rows of this batch.",
            )
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self._train.clip_norm)
        rate = learning_rate(self.step, self._train)
        for options in self._optimizer.param_groups:
            options["lr"] = rate
        self._optimizer.step()
        self.step += 1
        loss, cross_entropy, distillation = sums.tolist()
        return StepReport(
            step=self.step,
            loss=loss,
            cross_entropy=cross_entropy,
            distillation=distillation,
            gradient_norm=float(norm),
            learning_rate=rate,
            num_rows=num_rows,
            seconds=time.monotonic() - begun,
            waited_seconds=waited,
        )

    def state(self) -> dict[str, Any]:
        """Everything that decides the next step."""
        return {
            "model": _trained_state(self.student),
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def save(self, folder: Path) -> Path:
        """Write a checkpoint."""
        return save_checkpoint(folder, self.step, self.state(), self._run, self._train.keep_checkpoints)

    def resume(self, folder: Path) -> bool:
        """Go on from the newest checkpoint of this run; False where there is none.

        Raises:
            UsageError: it belongs to another run.
        """
        path = latest_checkpoint(folder)
        if path is None:
            return False
        state = load_checkpoint(path, self._run)
        self.student.load_state_dict(state["model"], strict=False)
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step = state["step"]
        return True

    def run(
        self,
        out: Path,
        on_step: Callable[[StepReport], None] = lambda report: None,
        validate: Callable[[], dict[str, Any]] | None = None,
    ) -> list[StepReport]:
        """Train to the last step, with checkpoints, validation and `metrics.jsonl` under `out`.

        Raises:
            UsageError: `out` holds another run's checkpoints.
        """
        out.mkdir(parents=True, exist_ok=True)
        reports = []
        self.resume(out / "checkpoints")
        with (out / "metrics.jsonl").open("a", encoding="utf-8") as log:
            while self.step < self._train.num_steps:
                if validate is not None and self.step % self._train.validate_steps == 0:
                    _log(log, {"step": self.step, "validation": validate(), "memory": memory_report(self._device)})
                report = self.run_step()
                reports.append(report)
                _log(log, asdict(report))
                on_step(report)
                if self.step % self._train.checkpoint_steps == 0 or self.step == self._train.num_steps:
                    self.save(out / "checkpoints")
            if validate is not None:
                _log(log, {"step": self.step, "validation": validate(), "memory": memory_report(self._device)})
        return reports

    def _numbers(self, step: int) -> list[int]:
        numbers = batch_of_step(step, len(self._pack.train), self._train)
        return share_of_rank(numbers, self.workers.rank, self.workers.world_size)


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    # Frozen weights (a base model under adapters, an autoencoder) are on the disk already.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name in trained}


def _log(log: Any, row: dict[str, Any]) -> None:
    log.write(json.dumps(row) + "\n")
    log.flush()


def _parameter_sets(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
