"""A causal language model small enough for tests of seconds, and completions for it."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparkray.grpo.rollouts import Rollout, RolloutGroup

VOCAB = 61


def tiny_llama(seed: int = 0, *, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def plain_logprobs(model: torch.nn.Module, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """[T], one text at a time, by transformers alone."""
    ids = torch.tensor([[*prompt, *completion]])
    logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0]


def draw_groups(model: torch.nn.Module, num_prompts: int, num_generations: int, seed: int = 0) -> list[RolloutGroup]:
    """Groups of random completions of 2 to 6 tokens, with the model's own log-probabilities as the engine's."""
    random = np.random.default_rng(seed)
    groups = []
    for row in range(num_prompts):
        prompt = tuple(int(token) for token in random.integers(0, VOCAB, random.integers(1, 8)))
        rollouts = []
        for _ in range(num_generations):
            tokens = tuple(int(token) for token in random.integers(0, VOCAB, random.integers(2, 7)))
            drawn = plain_logprobs(model, prompt, tokens).numpy()
            rollouts.append(Rollout(tokens, "", drawn, "stop", 0))
        groups.append(RolloutGroup(row, prompt, tuple(rollouts)))
    return groups
