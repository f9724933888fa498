"""Before and after: perplexity, KL a token, agreement of the best token, with bounds that fail.

Both models go through the same sequences a layer at a time, so that a pair larger than memory can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparkray.config.pruning import EngineName, ValidateConfig
from sparkray.errors import InputError, SparkrayError
from sparkray.pruning.calibration import CalibrationSet
from sparkray.pruning.checkpoint import Checkpoint
from sparkray.pruning.families import text_config
from sparkray.pruning.layered_model import LayeredModel, resolve_dtype
from sparkray.pruning.layout import read_layout
from sparkray.pruning.observation import MicroBatch, micro_batches
from sparkray.pruning.plan import PLAN_NAME, read_plan
from sparkray.pruning.rewrite import MANIFEST_NAME, verify_checksums

_ROWS_AT_ONCE = 256  # rows of logits in float32 at a time: a vocabulary of 200k makes 200 MB of them

Progress = Callable[[int, int], None]


class CheckFailedError(SparkrayError):
    """A pruned checkpoint is outside of a bound that was set."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a prune changed.

    Attributes:
        num_tokens: predicted tokens that were compared.
        perplexity_before, perplexity_after: exp of the mean negative log-likelihood of the next token.
        token_kl: mean KL(before || after) of the next-token distribution, in nats.
        top1_agreement: share of tokens where both models prefer the same token.
        engine: which engine gave the distributions.
        note: what a reader has to know of them, or None.
    """

    num_tokens: int
    perplexity_before: float
    perplexity_after: float
    token_kl: float
    top1_agreement: float
    engine: EngineName = "transformers"
    note: str | None = None

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity_after / self.perplexity_before

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"perplexity_ratio": self.perplexity_ratio}


def compare(
    before: Checkpoint,
    after: Checkpoint,
    data: CalibrationSet,
    config: ValidateConfig,
    progress: Progress | None = None,
) -> Comparison:
    """Run both models over `data` and compare their next-token distributions.

    Raises:
        InputError: the vocabularies differ, or no sequence has two tokens.
    """
    check_pair(before, after)
    dtype = resolve_dtype(config.dtype, before)
    models = (LayeredModel(before, dtype, config.device), LayeredModel(after, dtype, config.device))
    batches = list(micro_batches(data.sequences, config.micro_batch_sequences))
    steps = sum(model.num_layers for model in models)
    done = 0

    def layer_done() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    hidden = [_final_hidden(model, batches, layer_done) for model in models]
    sums = torch.zeros(5, dtype=torch.float64)
    for (ids_BT, mask_BT), *pair in zip(batches, *hidden, strict=True):
        logits = [model.logits_from(ids_BT, mask_BT, part) for model, part in zip(models, pair, strict=True)]
        sums += _sums(logits[0], logits[1], ids_BT, mask_BT)
    num_tokens, nll_before, nll_after, kl, agreed = sums.tolist()
    if num_tokens == 0:
        raise InputError("no sequence has two tokens, so no next token can be compared.")
    return Comparison(
        int(num_tokens),
        math.exp(nll_before / num_tokens),
        math.exp(nll_after / num_tokens),
        kl / num_tokens,
        agreed / num_tokens,
    )


def check_structure(directory: Path) -> int:
    """Read a pruned checkpoint as an engine would: headers, config, expert counts, checksums, one token.

    Returns:
        Experts of a layer.

    Raises:
        InputError: says what does not fit.
    """
    checkpoint = Checkpoint(directory)
    layout = read_layout(checkpoint)
    if (directory / PLAN_NAME).is_file() and read_plan(directory).num_experts_after != layout.num_experts:
        raise InputError(f"{directory} has {layout.num_experts} experts a layer, and its plan says otherwise.")
    if (directory / MANIFEST_NAME).is_file():
        verify_checksums(directory)
    model = LayeredModel(checkpoint, resolve_dtype("auto", checkpoint))
    ids, mask = torch.tensor([[0]]), torch.tensor([[1]])
    hidden = _final_hidden(model, [(ids, mask)], lambda: None)[0]
    if not bool(torch.isfinite(model.logits_from(ids, mask, hidden)).all()):
        raise InputError(f"{directory} gives logits that are not finite for one token.")
    return layout.num_experts


def broken_bounds(comparison: Comparison, config: ValidateConfig) -> list[str]:
    """The bounds that the comparison breaks, as sentences."""
    broken = []
    if config.max_perplexity_ratio is not None and not comparison.perplexity_ratio <= config.max_perplexity_ratio:
        broken.append(
            f"perplexity went from {comparison.perplexity_before:.4g} to {comparison.perplexity_after:.4g}, a factor of"
            f" {comparison.perplexity_ratio:.4g} where at most {config.max_perplexity_ratio:g} is allowed"
        )
    if config.max_token_kl is not None and not comparison.token_kl <= config.max_token_kl:
        broken.append(f"the KL a token is {comparison.token_kl:.4g} where at most {config.max_token_kl:g} is allowed")
    if config.min_top1_agreement is not None and not comparison.top1_agreement >= config.min_top1_agreement:
        broken.append(
            f"{comparison.top1_agreement:.1%} of the best tokens agree where at least"
            f" {config.min_top1_agreement:.1%} must"
        )
    return broken


def require_bounds(comparison: Comparison, config: ValidateConfig) -> None:
    """Raise CheckFailedError where a bound is broken."""
    broken = broken_bounds(comparison, config)
    if broken:
        raise CheckFailedError(
            f"the pruned checkpoint fails its check: {'; '.join(broken)}.",
            hint="Cut less, or calibrate on data that is nearer to its use.",
        )


def _final_hidden(
    model: LayeredModel, batches: Sequence[MicroBatch], layer_done: Callable[[], None]
) -> list[torch.Tensor]:
    hidden: list[torch.Tensor | None] = [None] * len(batches)
    for layer in range(model.num_layers):
        model.load_layers([layer])
        for place, (ids_BT, mask_BT) in enumerate(batches):
            hidden[place] = model.step(layer, ids_BT, mask_BT, hidden[place])
        model.free_layer(layer)
        layer_done()
    return [part for part in hidden if part is not None]


def _sums(
    before_BTV: torch.Tensor, after_BTV: torch.Tensor, ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> torch.Tensor:
    """(tokens, -log p before, -log p after, KL, agreements), summed over pairs of neighbouring real tokens."""
    valid = (mask_BT[:, :-1] * mask_BT[:, 1:]).bool()
    targets_N = ids_BT[:, 1:][valid].to(before_BTV.device)
    valid = valid.to(before_BTV.device)
    before_NV, after_NV = before_BTV[:, :-1][valid], after_BTV[:, :-1][valid]
    total = torch.zeros(5, dtype=torch.float64)
    for start in range(0, len(targets_N), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_before, log_after = (logits[rows].float().log_softmax(-1) for logits in (before_NV, after_NV))
        targets = targets_N[rows].unsqueeze(-1)
        kl = (log_before.exp() * (log_before - log_after)).sum(-1)
        agreed = log_before.argmax(-1) == log_after.argmax(-1)
        parts = (
            -log_before.gather(1, targets).double().sum(),
            -log_after.gather(1, targets).double().sum(),
            kl.double().sum(),
            agreed.double().sum(),
        )
        total += torch.stack((torch.tensor(float(len(targets)), dtype=torch.float64), *(part.cpu() for part in parts)))
    return total


def check_pair(before: Checkpoint, after: Checkpoint) -> None:
    """Refuse two checkpoints whose next-token distributions cannot be compared."""
    sizes = [int(text_config(part.config, part.family)["vocab_size"]) for part in (before, after)]
    if before.family != after.family or sizes[0] != sizes[1]:
        raise InputError(
            f"{after.directory} ({after.family.model_type}, {sizes[1]} tokens) is no prune of {before.directory}"
            f" ({before.family.model_type}, {sizes[0]} tokens)."
        )
