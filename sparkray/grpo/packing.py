"""Laying completions out for one forward pass.

Completions of one prompt differ after the prompt only. In a shared-prefix row the prompt stands once and its
completions follow; the attention mask lets each see the prompt and itself, and its positions go on where the prompt
ended. The log-probabilities are those of separate rows, and a prompt of 200 tokens with 8 completions of 32 costs 456
tokens and not 1,856. It holds for models whose tokens meet in causal attention alone; `plain` rows hold for all.

Shapes: R rows, S positions of the longest row, N completion tokens of all rows, B completions, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparkray.config.grpo import PackingName

_PROMPT = 0
_PADDING = -1


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion to be laid out.

    Attributes:
        prompt: the number of its prompt; equal numbers have equal prompt tokens.
        prompt_token_ids, token_ids: what came before it, and itself; neither is empty.
    """

    prompt: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and the completions (by number) that stand behind it."""

    prompt_token_ids: tuple[int, ...]
    completions: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Rows as tensors.

    Attributes:
        input_ids_RS: padded with 0.
        positions_RS: of each token in its own text.
        segments_RS: -1 padding, 0 prompt, 1.. the completions of a row.
        source_N: for each completion token the flat index (in R * S) of the token that it is predicted from.
        target_N: the completion tokens themselves.
        completion_N, step_N: which completion of `completions` a token belongs to, and its place in it.
        completions: numbers of the completions, as they were given to `plan_rows`.
    """

    input_ids_RS: Tensor
    positions_RS: Tensor
    segments_RS: Tensor
    source_N: Tensor
    target_N: Tensor
    completion_N: Tensor
    step_N: Tensor
    completions: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Positions that are computed, padding included."""
        return self.input_ids_RS.numel()

    def attention_mask(self) -> Tensor:
        """[R, 1, S, S], True where the row's token may see the column's."""
        segments_RS = self.segments_RS
        num_positions = segments_RS.shape[1]
        causal_SS = torch.ones(num_positions, num_positions, dtype=torch.bool, device=segments_RS.device).tril()
        same_RSS = segments_RS.unsqueeze(2) == segments_RS.unsqueeze(1)
        prompt_R1S = (segments_RS == _PROMPT).unsqueeze(1)
        # Padding sees itself: a row of the mask without any True makes NaN in some kernels.
        return ((same_RSS | prompt_R1S) & causal_SS).unsqueeze(1)

    def to_completions(self, values_N: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T] of values that were computed a completion token."""
        num_steps = int(self.step_N.max()) + 1
        values_BT = values_N.new_full((len(self.completions), num_steps), fill)
        return values_BT.index_put((self.completion_N, self.step_N), values_N)

    def mask(self) -> Tensor:
        """[B, T], 1 where a completion has a token."""
        return self.to_completions(torch.ones(self.step_N.shape, device=self.step_N.device))

    def to(self, device: torch.device) -> PackedBatch:
        names = ("input_ids_RS", "positions_RS", "segments_RS", "source_N", "target_N", "completion_N", "step_N")
        return PackedBatch(**{name: getattr(self, name).to(device) for name in names}, completions=self.completions)


def plan_batches(completions: Sequence[Completion], *, max_tokens: int, packing: PackingName) -> list[list[Row]]:
    """Cut completions into rows, and rows into batches of at most `max_tokens` positions, padding included.

    A completion that is longer than that with its prompt gets a batch of its own: nothing is cut off. Rows of like
    length share a batch.
    """
    rows = _shared_rows(completions, max_tokens) if packing == "shared_prefix" else _plain_rows(completions)
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (-row.num_tokens, row.completions)):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].num_tokens <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def build_batch(rows: Sequence[Row], completions: Sequence[Completion]) -> PackedBatch:
    """The tensors of one batch of rows."""
    num_positions = max(row.num_tokens for row in rows)
    input_ids_RS = torch.zeros(len(rows), num_positions, dtype=torch.long)
    positions_RS = torch.zeros(len(rows), num_positions, dtype=torch.long)
    segments_RS = torch.full((len(rows), num_positions), _PADDING, dtype=torch.long)
    source: list[int] = []
    target: list[int] = []
    completion: list[int] = []
    step: list[int] = []
    numbers: list[int] = []
    for at, row in enumerate(rows):
        num_prompt = len(row.prompt_token_ids)
        input_ids_RS[at, :num_prompt] = torch.tensor(row.prompt_token_ids)
        positions_RS[at, :num_prompt] = torch.arange(num_prompt)
        segments_RS[at, :num_prompt] = _PROMPT
        start = num_prompt
        for segment, number in enumerate(row.completions, start=1):
            token_ids = completions[number].token_ids
            stop = start + len(token_ids)
            input_ids_RS[at, start:stop] = torch.tensor(token_ids)
            positions_RS[at, start:stop] = torch.arange(num_prompt, num_prompt + len(token_ids))
            segments_RS[at, start:stop] = segment
            # The first token is predicted from the prompt's last, wherever the completion stands in its row.
            source += [at * num_positions + place for place in (num_prompt - 1, *range(start, stop - 1))]
            target += token_ids
            completion += [len(numbers)] * len(token_ids)
            step += range(len(token_ids))
            numbers.append(number)
            start = stop
    return PackedBatch(
        input_ids_RS,
        positions_RS,
        segments_RS,
        torch.tensor(source),
        torch.tensor(target),
        torch.tensor(completion),
        torch.tensor(step),
        tuple(numbers),
    )


def _plain_rows(completions: Sequence[Completion]) -> list[Row]:
    return [
        Row(one.prompt_token_ids, (number,), len(one.prompt_token_ids) + len(one.token_ids))
        for number, one in enumerate(completions)
    ]


def _shared_rows(completions: Sequence[Completion], max_tokens: int) -> list[Row]:
    by_prompt: dict[int, list[int]] = {}
    for number, one in enumerate(completions):
        by_prompt.setdefault(one.prompt, []).append(number)
    rows: list[Row] = []
    for numbers in by_prompt.values():
        prompt = completions[numbers[0]].prompt_token_ids
        taken: list[int] = []
        num_tokens = len(prompt)
        for number in numbers:
            length = len(completions[number].token_ids)
            if taken and num_tokens + length > max_tokens:
                rows.append(Row(prompt, tuple(taken), num_tokens))
                taken, num_tokens = [], len(prompt)
            taken.append(number)
            num_tokens += length
        rows.append(Row(prompt, tuple(taken), num_tokens))
    return rows
