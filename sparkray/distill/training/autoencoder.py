"""Training the autoencoder on chunks at any offset, and keeping it.

Shapes: N chunks, K tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparkray.config.distill import AutoencoderConfig
from sparkray.distill.data.pack import Pack, Sequences
from sparkray.distill.students.autoencoder import ChunkAutoencoder
from sparkray.errors import InputError, NotFoundError

_WARMUP_SHARE = 0.05
# Half of the chunks are of tokens drawn from the whole vocabulary: with a quarter, nearly every token that came back
# wrong was one that the training text had not.
_RANDOM_SHARE = 0.5


def train_autoencoder(
    pack: Pack,
    config: AutoencoderConfig,
    device: torch.device,
    on_step: Callable[[int, float], None] = lambda step, cross_entropy: None,
) -> ChunkAutoencoder:
    """An autoencoder of a pack's training text.

    Args:
        pack: text; its chunks are taken at any offset.
        config: sizes, steps and seed; the same seed gives the same weights.
        device: to train on.
        on_step: called with the step, from 1, and the cross entropy of a token in nats.
    """
    torch.manual_seed(config.seed)
    model = ChunkAutoencoder(config, pack.header.vocab_size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, fused=True)
    tokens = _tokens(pack.train)
    if len(tokens) < config.chunk_tokens:
        raise InputError(f"the pack has {len(tokens)} tokens, and a chunk {config.chunk_tokens}.", param="pack")
    order = np.random.default_rng(config.seed)
    for step in range(config.num_steps):
        starts = order.integers(0, len(tokens) - config.chunk_tokens + 1, config.batch_chunks)
        chunks_NK = tokens[starts[:, None] + np.arange(config.chunk_tokens)]
        num_random = int(config.batch_chunks * _RANDOM_SHARE)
        chunks_NK[:num_random] = order.integers(0, pack.header.vocab_size, (num_random, config.chunk_tokens))
        done = step / config.num_steps
        rate = min(1.0, (step + 1) / (_WARMUP_SHARE * config.num_steps + 1)) * (
            0.05 + 0.475 * (1 + math.cos(math.pi * done))
        )
        for options in optimizer.param_groups:
            options["lr"] = config.learning_rate * rate
        optimizer.zero_grad(set_to_none=True)
        loss, cross_entropy = model.loss(torch.from_numpy(chunks_NK).to(device))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        on_step(step + 1, cross_entropy.item())
    return model.eval()


def aligned_chunks(data: Sequences, chunk_tokens: int) -> Tensor:
    """Every whole chunk as a student reads it, (N, K)."""
    ids_NK, documents_NK = (part.reshape(-1, chunk_tokens) for part in (data.ids_ST, data.documents_ST))
    return torch.from_numpy(ids_NK[(documents_NK >= 0).all(-1)].astype(np.int64))


def save_autoencoder(model: ChunkAutoencoder, folder: Path, tokenizer_sha256: str) -> None:
    """Write weights and, last, `autoencoder.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    building = folder / "autoencoder.pt.building"
    torch.save(model.state_dict(), building)
    building.rename(folder / "autoencoder.pt")
    described = {
        "config": model.config.model_dump(),
        "vocab_size": model.embedding.num_embeddings,
        "tokenizer_sha256": tokenizer_sha256,
    }
    building = folder / "autoencoder.json.building"
    building.write_text(json.dumps(described, indent=1), encoding="utf-8")
    building.rename(folder / "autoencoder.json")


def load_autoencoder(folder: Path, tokenizer_sha256: str) -> ChunkAutoencoder:
    """An autoencoder that was kept.

    Raises:
        NotFoundError: the folder holds none.
        InputError: it was trained on another tokenizer's ids.
    """
    path = folder / "autoencoder.json"
    if not path.is_file():
        raise NotFoundError(
            f"{folder} holds no autoencoder.",
            hint="Train one: sparkray distill train-ae PACK OUT.",
            param="autoencoder",
        )
    described = json.loads(path.read_text(encoding="utf-8"))
    if described["tokenizer_sha256"] != tokenizer_sha256:
        raise InputError(f"the autoencoder {folder} was trained on the ids of another tokenizer than the pack's.")
    model = ChunkAutoencoder(AutoencoderConfig(**described["config"]), described["vocab_size"])
    model.load_state_dict(torch.load(folder / "autoencoder.pt", weights_only=True, map_location="cpu"))
    return model.eval()


def _tokens(data: Sequences) -> np.ndarray:
    return data.ids_ST[data.documents_ST >= 0].astype(np.int64)
