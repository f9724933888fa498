"""Writing with a causal student: sampling token by token, as a stream, and beam search.

Shapes: V vocabulary, W beams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sparkray.distill.students.causal import CausalStudent
from sparkray.distill.students.latent import LatentStudent

# A chunk that is drawn so often among the candidates is as good as certain.
_MAX_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Beam:
    """A continuation and its log-probability, in nats."""

    token_ids: list[int]
    logprob: float


def sample_stream(
    student: CausalStudent,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    end_id: int,
    seed: int,
) -> Iterator[int]:
    """Tokens as they are drawn, until `end_id` or `max_tokens`; temperature 0 takes the likeliest.

    Args:
        student: the model.
        prompt: tokens before; at least one.
        max_tokens: most tokens to write.
        temperature: 0 or more.
        top_p: the smallest set of likeliest tokens with this mass is drawn from.
        end_id: ends the text and is not given out.
        seed: of the draws.
    """
    student.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_tokens):
        logits_V = student.logits(torch.tensor([ids], device=student.head.device))[0, -1].cpu()
        token = int(logits_V.argmax()) if temperature == 0 else _draw(logits_V / temperature, top_p, generator)
        if token == end_id:
            return
        ids.append(token)
        yield token


def beam_search(
    student: CausalStudent, prompt: Sequence[int], *, max_tokens: int, num_beams: int, end_id: int
) -> list[Beam]:
    """The likeliest continuations found, likeliest first; finished ones keep their place by total log-probability."""
    student.eval()
    beams, finished = [Beam([], 0.0)], list[Beam]()
    for _ in range(max_tokens):
        ids_WT = torch.tensor([[*prompt, *beam.token_ids] for beam in beams], device=student.head.device)
        logprobs_WV = student.logits(ids_WT)[:, -1].log_softmax(-1).cpu()
        totals_WV = logprobs_WV + torch.tensor([[beam.logprob] for beam in beams])
        best = totals_WV.flatten().topk(min(2 * num_beams, totals_WV.numel()))
        grown: list[Beam] = []
        for total, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            beam, token = beams[place // logprobs_WV.shape[1]], place % logprobs_WV.shape[1]
            if token == end_id:
                finished.append(Beam(beam.token_ids, total))
            elif len(grown) < num_beams:
                grown.append(Beam([*beam.token_ids, token], total))
        finished = sorted(finished, key=lambda beam: -beam.logprob)[:num_beams]
        # Totals only fall, so an open beam below the worst finished one cannot come back.
        if len(finished) == num_beams and grown[0].logprob <= finished[-1].logprob:
            return finished
        beams = grown
    return sorted([*finished, *beams], key=lambda beam: -beam.logprob)[:num_beams]


def write_latent(
    student: LatentStudent, prompt: Sequence[int], max_tokens: int, temperature: float, end_id: int, seed: int
) -> list[int]:
    """Continue with a latent student; at temperature 1/n for the n that is nearest.

    The prompt is filled up on the left with `end_id` to whole chunks, as a text that begins after another one.
    """
    chunk = student.autoencoder.config.chunk_tokens
    filled = [end_id] * (-len(prompt) % chunk) + list(prompt)
    repeats = max(1, min(_MAX_REPEATS, round(1 / max(temperature, 1 / _MAX_REPEATS))))
    return student.generate(
        torch.tensor(filled).reshape(-1, chunk),
        -(-max_tokens // chunk),
        end_id=end_id,
        repeats=repeats,
        generator=torch.Generator().manual_seed(seed),
    )[:max_tokens]


def _draw(logits_V: torch.Tensor, top_p: float, generator: torch.Generator) -> int:
    ordered = logits_V.softmax(-1).sort(descending=True)
    # The token that reaches the mass belongs to the set.
    kept_V = ordered.values.cumsum(-1) - ordered.values < top_p
    place = torch.multinomial(ordered.values * kept_V, 1, generator=generator)
    return int(ordered.indices[place])
