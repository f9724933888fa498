"""The latent student: a causal transformer that draws the next chunk's vector, after CALM (Shao et al. 2025).

It reads tokens, not vectors: the K embeddings of a chunk squeezed into one input. Output i is made from a learned start
and the chunks before i, so a chunk is never seen by its own prediction. A small head turns a hidden state and fresh
noise into one sample of the next vector; two calls give two samples, so it draws from a distribution and does not
predict its mean.

What the teacher says about the tokens of a chunk one by one is not the joint distribution of the chunk, except for its
first token: there the teacher's row after the chunk before is the exact target, and only there it is used.

Shapes: B sequences, C chunks, K tokens, H hidden width, Z latent numbers, S samples, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparkray.config.distill import LatentConfig
from sparkray.distill.students.autoencoder import Block, ChunkAutoencoder
from sparkray.distill.students.sampled_softmax import sampled_cross_entropy

# Vectors say little at first, so at first the shares decide: a third of the decoder's logits, and it is learnt.
_FIRST_LOG_SCALE = -1.0


class LatentStudent(nn.Module):
    """Draws chunks one after the other.

    Args:
        config: sizes.
        autoencoder: trained; its weights stay as they are.
        max_chunks: longest sequence.
        log_shares_V: logarithm of each token's share of the text; all alike where it is not given.
    """

    log_shares_V: Tensor

    def __init__(
        self,
        config: LatentConfig,
        autoencoder: ChunkAutoencoder,
        max_chunks: int,
        log_shares_V: Tensor | None = None,
    ) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        self.config = config
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        chunk, latent = autoencoder.config.chunk_tokens, autoencoder.config.latent_size
        vocab_size = autoencoder.embedding.num_embeddings
        width = config.hidden_size
        self.embedding = nn.Embedding(vocab_size, width)
        # Small, so that a token that was never learnt says little, and not something random.
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.squeeze = nn.Sequential(nn.Linear(chunk * width, width), Block(width))
        self.start = nn.Parameter(torch.zeros(width))
        self.backbone = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=width,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                max_position_embeddings=max_chunks + 1,
            )
        )
        self.noise = nn.Linear(config.noise_size, width)
        self.register_buffer("log_shares_V", torch.zeros(vocab_size) if log_shares_V is None else log_shares_V)
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_LOG_SCALE))
        self.head = nn.Sequential(Block(width), Block(width), nn.RMSNorm(width), nn.Linear(width, latent))

    def forward(self, ids_BCK: Tensor) -> Tensor:
        """Hidden states that predict each chunk from the ones before it, (B, C + 1, H)."""
        chunks_BCH = self.squeeze(self.embedding(ids_BCK).flatten(-2))
        start_B1H = self.start.expand(ids_BCK.shape[0], 1, -1)
        inputs = torch.cat([start_B1H, chunks_BCH], 1)
        states: Tensor = self.backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return states

    def sample(self, hidden: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Vectors drawn for each hidden state, (S, ..., Z)."""
        shape = (num_samples, *hidden.shape[:-1], self.config.noise_size)
        noise = torch.rand(shape, generator=generator).to(hidden.device) - 0.5
        drawn: Tensor = self.head(hidden + self.noise(noise))
        return drawn

    @torch.no_grad()
    def sample_chunks(self, hidden: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """Tokens of drawn chunks, (S, ..., K), by `token_choice`.

        A student that learnt with the cross entropy writes vectors between the codes, whose decodings are uncertain and
        meant so; it draws from them. One that learnt the energy score alone writes codes, and takes the likeliest.
        """
        latents = self.sample(hidden, num_samples, generator)
        if self.config.token_choice == "likeliest":
            return self.autoencoder.decode(latents).argmax(-1)
        return draw_tokens(self.logits(latents), generator)

    def logits(self, latents: Tensor) -> Tensor:
        """Of the tokens of drawn vectors, (..., K, V).

        The autoencoder knows which token a vector is of, and on purpose not which tokens are frequent; a vector that
        is between codes leaves that open, and the shares of the text answer.
        """
        return self.autoencoder.decode(latents) * self.log_scale.exp() + self.log_shares_V

    def cross_entropy(self, latents_NZ: Tensor, chunks_NK: Tensor) -> Tensor:
        """Of the chunks' tokens given drawn vectors, (N, K), in nats, over `ce_negatives` tokens for the vocabulary."""
        states_NKH = self.autoencoder.decoded(latents_NZ) * self.log_scale.exp()
        return sampled_cross_entropy(
            states_NKH.flatten(0, 1),
            self.autoencoder.embedding.weight,
            self.log_shares_V,
            chunks_NK.flatten(),
            self.config.ce_negatives,
        ).view_as(chunks_NK)

    @torch.no_grad()
    def generate(
        self,
        ids_CK: Tensor,
        num_chunks: int,
        *,
        end_id: int,
        repeats: int = 1,
        num_candidates: int = 32,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Continue chunks until one holds `end_id`, or `num_chunks` are written; the tokens written.

        Args:
            ids_CK: the beginning, in whole chunks; may be empty.
            num_chunks: most chunks to write.
            end_id: token that ends a text.
            repeats: n for the temperature 1/n; 1 draws from the model as it is.
            num_candidates: chunks drawn for one choice below temperature 1.
            generator: of all draws.
        """
        self.eval()
        written: list[int] = []
        for _ in range(num_chunks):
            hidden_1H = self(ids_CK[None])[:, -1]
            num_drawn = 1 if repeats == 1 else num_candidates
            drawn_SK = self.sample_chunks(hidden_1H, num_drawn, generator)[:, 0]
            chosen = choose_chunk([tuple(chunk) for chunk in drawn_SK.tolist()], repeats, generator)
            ids_CK = torch.cat([ids_CK, torch.tensor([chosen], device=ids_CK.device)])
            if end_id in chosen:
                return written + list(chosen[: chosen.index(end_id)])
            written.extend(chosen)
        return written


def draw_tokens(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token from each row of logits (..., V), as an inverse of the cumulated probabilities."""
    cumulated = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    places = torch.rand((*logits.shape[:-1], 1), dtype=torch.float64, generator=generator).to(logits.device)
    drawn = torch.searchsorted(cumulated, places * cumulated[..., -1:], right=True)[..., 0]
    return drawn.clamp_max(logits.shape[-1] - 1)


def choose_chunk(
    candidates: Sequence[tuple[int, ...]], repeats: int, generator: torch.Generator | None = None
) -> tuple[int, ...]:
    """A draw at temperature 1/n from draws at temperature 1, without likelihoods (CALM's batch form).

    A chunk seen c times weighs C(c, n), the ways in which n draws could all have been it; where none was seen n times,
    n is lowered until one was.
    """
    counts = Counter(candidates)
    for size in range(repeats, 0, -1):
        weights = [math.comb(count, size) for count in counts.values()]
        if any(weights):
            break
    place = torch.multinomial(torch.tensor(weights, dtype=torch.float64), 1, generator=generator).item()
    return list(counts)[int(place)]
