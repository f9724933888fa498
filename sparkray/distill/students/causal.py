"""An ordinary causal language model as student: from scratch, from a folder, whole or with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparkray.config.distill import StudentConfig
from sparkray.errors import InputError, MissingExtraError
from sparkray.models import prepare_model


class CausalStudent(nn.Module):
    """Hidden states and the output matrix apart, so that logits are made in chunks.

    Args:
        model: a transformers model for causal language modelling.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Last hidden states, (B, T, H)."""
        states: Tensor = self._base.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
        return states

    @property
    def head(self) -> Tensor:
        """The output matrix, (V, H)."""
        weight: Tensor = self._base.get_output_embeddings().weight
        return weight

    @property
    def vocab_size(self) -> int:
        return int(self.head.shape[0])

    @torch.no_grad()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """Full logits, (B, T, V); for evaluation and generation of short texts."""
        return nn.functional.linear(self(ids_BT), self.head).float()

    def save(self, folder: Path) -> None:
        """Write weights (or adapters) and config.json as transformers loads them."""
        self.model.save_pretrained(folder)

    @property
    def _base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model


def create_causal_student(
    config: StudentConfig,
    *,
    vocab_size: int,
    max_tokens: int,
    seed: int,
    activation_checkpointing: bool = False,
) -> CausalStudent:
    """The student that the settings describe, in float32; the same seed gives the same weights.

    Args:
        config: shape, or where it starts from.
        vocab_size: of the tokenizer that it learns.
        max_tokens: longest text that it will see.
        seed: of the first weights.
        activation_checkpointing: compute activations again in the backward pass.

    Raises:
        InputError: the starting weights belong to a smaller vocabulary.
        MissingExtraError: adapters without peft.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model: Any
    if config.init_from is None:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                max_position_embeddings=max_tokens,
                tie_word_embeddings=True,
            )
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(prepare_model(config.init_from), dtype=torch.float32)
        if model.config.vocab_size < vocab_size:
            raise InputError(
                f"{config.init_from} has {model.config.vocab_size} tokens, and the pack's tokenizer {vocab_size}.",
                hint="Pack the text with the student's tokenizer, or start from a model of the teacher's family.",
                param="student.init_from",
            )
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if config.lora is not None:
        model = _with_adapters(model, config)
    return CausalStudent(model)


def _with_adapters(model: Any, config: StudentConfig) -> Any:
    try:
        from peft import LoraConfig as Adapters
        from peft import get_peft_model
    except ImportError as failure:
        raise MissingExtraError.for_module("peft", "train") from failure
    assert config.lora is not None
    return get_peft_model(
        model,
        Adapters(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
