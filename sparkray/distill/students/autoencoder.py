"""A variational autoencoder over chunks of K tokens, after CALM (Shao et al. 2025).

Two regularisers make the latent space one that can be written into: the divergence from a standard normal, with a free
part for each number so that none collapses, and dropout on tokens and latent numbers, so that a vector beside the
posterior still decodes.

Shapes: N chunks, K tokens, H hidden width, Z latent numbers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparkray.config.distill import AutoencoderConfig
from sparkray.distill.students.sampled_softmax import standing_for

# A fifth of the spread of the means: noise that a fresh code bears.
_FIRST_LOG_VARIANCE = -3.0
_MATCHED_CHUNKS = 256


@dataclass(frozen=True, slots=True)
class Posterior:
    """Means and logarithms of the variances, (N, Z) each."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One vector for each chunk."""
        noise = torch.randn(self.mean.shape, generator=generator).to(self.mean.device)
        return self.mean + noise * (self.log_variance / 2).exp()

    def kl(self) -> Tensor:
        """Divergence of each number from a standard normal, in nats, (N, Z)."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance)


class Block(nn.Module):
    """A gated feed-forward layer on a normalised input, added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return result


class ChunkAutoencoder(nn.Module):
    """Chunks to vectors and back; the output matrix is the embedding.

    Args:
        config: sizes.
        vocab_size: of the tokenizer.
    """

    def __init__(self, config: AutoencoderConfig, vocab_size: int) -> None:
        super().__init__()
        width, chunk = config.hidden_size, config.chunk_tokens
        self.config = config
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.encode_tokens = nn.Sequential(*(Block(width) for _ in range(config.num_layers)))
        self.squeeze = nn.Linear(chunk * width, width)
        self.encode_chunk = nn.Sequential(*(Block(width) for _ in range(config.num_layers)), nn.RMSNorm(width))
        self.posterior = nn.Linear(width, 2 * config.latent_size)
        self.open = nn.Linear(config.latent_size, width)
        self.decode_chunk = nn.Sequential(*(Block(width) for _ in range(config.num_layers)))
        self.expand = nn.Linear(width, chunk * width)
        self.decode_tokens = nn.Sequential(*(Block(width) for _ in range(config.num_layers)), nn.RMSNorm(width))
        self._begin_as_a_linear_code()

    @torch.no_grad()
    def _begin_as_a_linear_code(self) -> None:
        """Blocks that add nothing yet, a random projection as encoder and its transpose as decoder.

        So most chunks of random embeddings come back before the first step, where latent numbers are many enough, and
        training need not find that out from the cross entropy.
        """
        for block in self.modules():
            if isinstance(block, Block):
                nn.init.zeros_(block.down.weight)
        latent = self.config.latent_size
        nn.init.orthogonal_(self.squeeze.weight)
        nn.init.orthogonal_(self.posterior.weight[:latent])
        nn.init.zeros_(self.posterior.weight[latent:])
        for layer in (self.squeeze, self.posterior, self.open, self.expand):
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.posterior.bias[latent:], _FIRST_LOG_VARIANCE)
        self.open.weight.copy_(self.posterior.weight[:latent].T)
        self.expand.weight.copy_(self.squeeze.weight.T)

    def encode(self, ids_NK: Tensor) -> Posterior:
        """Posteriors of chunks; in training some tokens are masked."""
        tokens_NKH = self.embedding(ids_NK)
        if self.training and self.config.dropout:
            kept_NK1 = torch.rand(ids_NK.shape, device=ids_NK.device)[..., None] >= self.config.dropout
            tokens_NKH = tokens_NKH * kept_NK1
        chunk_NH = self.encode_chunk(self.squeeze(self.encode_tokens(tokens_NKH).flatten(-2)))
        mean_NZ, log_variance_NZ = self.posterior(chunk_NH).chunk(2, -1)
        return Posterior(mean_NZ, log_variance_NZ.clamp(-10, 10))

    def decode(self, latents_NZ: Tensor) -> Tensor:
        """Logits of the chunk's tokens, (..., K, V)."""
        return nn.functional.linear(self.decoded(latents_NZ), self.embedding.weight)

    def decoded(self, latents_NZ: Tensor) -> Tensor:
        """States of the chunk's tokens, (..., K, H), which the embedding turns into logits."""
        chunk_NH = self.decode_chunk(self.open(latents_NZ))
        tokens_NKH = self.expand(chunk_NH).unflatten(-1, (self.config.chunk_tokens, self.config.hidden_size))
        decoded: Tensor = self.decode_tokens(tokens_NKH)
        return decoded

    def loss(self, ids_NK: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, and the cross entropy of a token, both in nats.

        The cross entropy counts for each token of the chunk; divergence below the free part has no gradient. Where the
        vocabulary is large, it is taken over the batch's own tokens and some drawn from the others. These count once
        and not for all that were not drawn: a code shall say which token it is of, however rare, and not which tokens
        are frequent.
        """
        posterior = self.encode(ids_NK)
        latents_NZ = nn.functional.dropout(posterior.sample(), self.config.dropout, self.training)
        cross_entropy = self._cross_entropy(self.decoded(latents_NZ).flatten(0, 1), ids_NK.flatten())
        divergence = posterior.kl().clamp_min(self.config.kl_floor).sum(-1).mean()
        total: Tensor = self.config.chunk_tokens * cross_entropy + self.config.kl_weight * divergence
        return total, cross_entropy.detach()

    def _cross_entropy(self, decoded_NH: Tensor, ids_N: Tensor) -> Tensor:
        standing = standing_for(ids_N, self.embedding.num_embeddings, self.config.num_negatives)
        logits_NC = nn.functional.linear(decoded_NH, self.embedding(standing.ids_C))
        return nn.functional.cross_entropy(logits_NC, standing.places(ids_N))

    @torch.no_grad()
    def exact_match(self, ids_NK: Tensor) -> float:
        """Share of chunks that come back whole from a sample of their posterior."""
        was_training = self.training
        self.eval()
        num_whole = 0
        # Logits of all held-out chunks at once are tens of gigabytes.
        for first in range(0, len(ids_NK), _MATCHED_CHUNKS):
            some_NK = ids_NK[first : first + _MATCHED_CHUNKS]
            found_NK = self.decode(self.encode(some_NK).sample()).argmax(-1)
            num_whole += int((found_NK == some_NK).all(-1).sum())
        self.train(was_training)
        return num_whole / len(ids_NK)
