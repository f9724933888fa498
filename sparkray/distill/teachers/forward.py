"""A teacher in this process: a transformers model, its full vocabulary at hand, so its tail can be drawn from.

Shapes: L rows, H hidden width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkray.config.distill import StoreConfig, TeacherConfig
from sparkray.distill.identity import TeacherIdentity
from sparkray.distill.scores import TokenScores, joined
from sparkray.distill.targets import draw_generator, scores_from_logits

# Rows whose full logits stand in memory at once: 128 x 150,000 in float32 are 77 MB.
_ROWS_AT_ONCE = 128
_BLOCKS, _BLOCK_BYTES = 64, 65_536


class ForwardTeacher:
    """Scores by a forward pass.

    Args:
        folder: of the model.
        config: dtype, device, context.
        store: draws from the tail, their seed, and the temperature.
        tokenizer_sha256: hash of its tokenizer.
    """

    def __init__(self, folder: Path, config: TeacherConfig, store: StoreConfig, tokenizer_sha256: str) -> None:
        import transformers

        self._config = config
        self._store = store
        transformers.utils.logging.disable_progress_bar()
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.dtype))
        self.model = loaded.to(config.device).eval().requires_grad_(False)
        self._identity = TeacherIdentity(
            model=weights_sha256(folder),
            revision=config.revision or "",
            quantization=config.quantization or "",
            tokenizer_sha256=tokenizer_sha256,
            engine=f"transformers {transformers.__version__}",
            dtype=config.dtype,
            endpoint="local",
            mode="forward",
        )

    @property
    def identity(self) -> TeacherIdentity:
        return self._identity

    @property
    def parameters(self) -> str:
        store = self._store
        return f"temperature={store.temperature!r} tail_draws={store.tail_draws} seed={store.seed}"

    @property
    def max_model_tokens(self) -> int:
        limit: int = getattr(self.model.config, "max_position_embeddings", self._config.max_model_tokens)
        return min(self._config.max_model_tokens, limit)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @torch.inference_mode()
    def hidden(self, token_ids: Sequence[int]) -> Tensor:
        """Last hidden states of all tokens but the last, (L, H)."""
        ids = torch.tensor([list(token_ids[:-1])], device=self._config.device)
        states: Tensor = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        return states

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Full rows, (L, V); for short texts and for tests."""
        rows: Tensor = self.model.get_output_embeddings()(self.hidden(token_ids)).float()
        return rows

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], top_logprobs: int) -> TokenScores:
        """Head, draws and entropy of each row."""
        hidden_LH = self.hidden(token_ids)
        following_L = torch.tensor(list(token_ids[1:]), device=hidden_LH.device)
        generator = draw_generator(self._store.seed, token_ids, hidden_LH.device)
        head = self.model.get_output_embeddings()
        parts = []
        for start in range(0, len(token_ids) - 1, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            parts.append(
                scores_from_logits(
                    head(hidden_LH[rows]),
                    following_L[rows],
                    top_logprobs=top_logprobs,
                    tail_draws=self._store.tail_draws,
                    generator=generator,
                    temperature=self._store.temperature,
                )
            )
        return joined(parts)

    def close(self) -> None:
        del self.model


def weights_sha256(folder: Path) -> str:
    """Identity of a model's weights: names, sizes and blocks spread over every file, not all of their bytes.

    Another training of the same shape differs in nearly all of the blocks; reading 160 GB for a key would take minutes.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as stream:
            for block in range(_BLOCKS):
                stream.seek(block * max(size - _BLOCK_BYTES, 0) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
