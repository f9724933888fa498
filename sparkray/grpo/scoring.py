"""Log-probabilities and entropies of laid-out completions under a policy, in one forward pass.

Only the positions that predict a completion token reach the vocabulary, a chunk at a time: the logits of a whole
batch (49,152 to 152,064 numbers a position) are never held, in the backward pass neither.

Shapes: R rows, S positions, H hidden size, N completion tokens, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparkray.grpo.packing import PackedBatch

_CHUNK_TOKENS = 512


class Scorer(nn.Module):
    """A causal language model seen as a function from completions to log-probabilities.

    Args:
        model: of transformers, with or without an adapter, loaded with `attn_implementation="sdpa"`.
        temperature: of the distribution that completions are drawn from.

    It is a module so that FSDP can take it as the root: what it shards is gathered in `forward`.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) in nats; gradients flow into the former alone."""
        model: Any = self.model
        # peft puts its adapters into the model's own layers, so the model below its wrapper is the adapted one.
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden_RSH = causal.get_decoder()(
            input_ids=batch.input_ids_RS,
            position_ids=batch.positions_RS,
            attention_mask=batch.attention_mask(),
            use_cache=False,
        ).last_hidden_state
        hidden_NH = hidden_RSH.flatten(0, 1)[batch.source_N]
        head = causal.get_output_embeddings()
        chunks = [
            checkpoint(_score_chunk, head, hidden_CH, target_C, self.temperature, use_reentrant=False)
            for hidden_CH, target_C in zip(
                torch.split(hidden_NH, _CHUNK_TOKENS), torch.split(batch.target_N, _CHUNK_TOKENS), strict=True
            )
        ]
        return torch.cat([logprobs for logprobs, _ in chunks]), torch.cat([entropy for _, entropy in chunks])


def _score_chunk(head: nn.Module, hidden_CH: Tensor, target_C: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_CV = head(hidden_CH).float() / temperature
    log_sum_C = logits_CV.logsumexp(-1)
    logprobs_C = logits_CV.gather(1, target_C.unsqueeze(1)).squeeze(1) - log_sum_C
    with torch.no_grad():
        entropy_C = log_sum_C - (logits_CV.softmax(-1) * logits_CV).sum(-1)
    return logprobs_C, entropy_C
