"""The prepared embedded model against transformers' own reading of the GGUF file, and against common sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparkray.models import embedded, prepare_model

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_model("embedded")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_logits_equal_those_of_transformers_own_reading(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    gguf = embedded.gguf_path()
    own = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        ids_BT = tokenizer(PROMPT, return_tensors="pt").input_ids
        logits_BTV, own_logits_BTV = model(ids_BT).logits, own(ids_BT).logits
    assert own_logits_BTV.abs().max() > 10
    torch.testing.assert_close(logits_BTV, own_logits_BTV, rtol=0, atol=1e-4)


def test_the_model_says_paris_and_ends_its_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids_BT = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        following = model(ids_BT).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**chat, max_new_tokens=24, do_sample=False)[0, chat["input_ids"].shape[1] :]
    text = tokenizer.decode(written)
    assert "Paris" in text
    assert text.endswith("<|im_end|>")


def test_the_chat_template_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == 8192
