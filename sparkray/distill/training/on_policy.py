"""Learning on the student's own words: it writes, the teacher scores what was written (GKD, Agarwal et al. 2024).

No gradient flows through the drawing. The rows that count are those of the written tokens, so a student learns what the
teacher would do in the places that the student gets itself into.

Shapes: B sequences, T tokens, L = T - 1 rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparkray.config.distill import LossConfig, OnPolicyConfig
from sparkray.distill.data.pack import Sequences
from sparkray.distill.scores import TokenScores
from sparkray.distill.students.causal import CausalStudent
from sparkray.distill.targets import target_rows
from sparkray.distill.training.batch import LossSums, MicroBatch, loss_sums
from sparkray.distill.training.objective import CausalObjective
from sparkray.errors import InputError

ScoreMany = Callable[[Sequence[list[int]]], list[TokenScores]]


@dataclass(frozen=True, slots=True)
class OnPolicyObjective:
    """A mix of the student's own sequences and the data's.

    Which sequences are the student's is decided by their numbers, so it does not hang on how a batch is split.

    Args:
        loss: divergence and weights; the data's cross entropy does not apply to what the student wrote.
        config: share, lengths, temperature.
        score: the live teacher.
    """

    loss: LossConfig
    config: OnPolicyConfig
    score: ScoreMany

    def num_rows(self, data: Sequences, number: int) -> int:
        if self._written(number):
            return self.config.new_tokens
        return CausalObjective(self.loss).num_rows(data, number)

    def losses(
        self,
        student: nn.Module,
        data: Sequences,
        numbers: Sequence[int],
        scores: Sequence[TokenScores] | None,
        device: torch.device,
    ) -> LossSums:
        assert isinstance(student, CausalStudent)
        own = [place for place, number in enumerate(numbers) if self._written(number)]
        others = [place for place in range(len(numbers)) if place not in own]
        sums: list[LossSums] = []
        if others:
            rows = None if scores is None else [scores[place] for place in others]
            given = [numbers[place] for place in others]
            sums.append(CausalObjective(self.loss).losses(student, data, given, rows, device))
        if own:
            batch = self._written_batch(student, data, [numbers[place] for place in own], device)
            sums.append(loss_sums(student, batch, self.loss.model_copy(update={"ce_weight": 0.0})))
        return LossSums(
            total=torch.stack([one.total for one in sums]).sum(),
            cross_entropy=torch.stack([one.cross_entropy for one in sums]).sum(),
            distillation=torch.stack([one.distillation for one in sums]).sum(),
        )

    def _written(self, number: int) -> bool:
        digest = hashlib.sha256(f"on-policy {number}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.config.share * 2**64

    def _written_batch(
        self, student: CausalStudent, data: Sequences, numbers: Sequence[int], device: torch.device
    ) -> MicroBatch:
        prompts = [data.tokens(number)[: self.config.prompt_tokens] for number in numbers]
        shortest = min(len(prompt) for prompt in prompts)
        prompt_BT = torch.from_numpy(np.array([prompt[:shortest] for prompt in prompts], np.int64)).to(device)
        ids_BT = write(student, prompt_BT, self.config.new_tokens, self.config.temperature)
        scores = self.score([[int(token) for token in row] for row in ids_BT])
        mask_BL = torch.zeros((len(numbers), ids_BT.shape[1] - 1), dtype=torch.bool)
        mask_BL[:, shortest - 1 :] = True
        rows = target_rows([one.rows(shortest - 1, one.num_rows) for one in scores]).to(device)
        return MicroBatch(ids_BT, mask_BL.to(device), rows)


@torch.no_grad()
def write(student: CausalStudent, prompt_BT: Tensor, new_tokens: int, temperature: float) -> Tensor:
    """Prompts and the tokens drawn after them, (B, T + new_tokens); draws come from torch's own generator."""
    ids_BT = prompt_BT
    for _ in range(new_tokens):
        last_BV = nn.functional.linear(student(ids_BT)[:, -1], student.head).float() / temperature
        drawn_B1 = torch.multinomial(last_BV.softmax(-1).cpu(), 1).to(ids_BT.device)
        ids_BT = torch.cat([ids_BT, drawn_B1], 1)
    return ids_BT


def require_room(config: OnPolicyConfig, sequence_tokens: int) -> None:
    """Refuse lengths that the student cannot hold.

    Raises:
        InputError: prompt and new tokens exceed the pack's sequences.
    """
    if config.share and config.prompt_tokens + config.new_tokens > sequence_tokens:
        raise InputError(
            f"on_policy asks for {config.prompt_tokens} + {config.new_tokens} tokens, and the pack's sequences have"
            f" {sequence_tokens}.",
            param="on_policy.new_tokens",
        )
