"""A GGUF file becomes the tensors, configuration and tokenizer that transformers expects: numbers by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from sparkray.errors import InputError
from sparkray.models import embedded, prepare_model, resolve_model
from sparkray.models.cache import damage_of
from sparkray.models.convert import convert_gguf, rotary_rows_to_halves

HIDDEN, HEADS, KV_HEADS, INNER = 8, 2, 1, 6
TOKENS = ["<|end|>", "a", "b", "1", "2", "Ġ", "ab", "12", "<tool>"]


def tiny_gguf(path: Path, **changed: Any) -> dict[str, np.ndarray]:
    """A one-layer llama with an untied head, in float32; returns its tensors by GGUF name."""
    architecture = changed.get("architecture", "llama")
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changed.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 1, 1, 1, 1, 1, 1, 1, 4])
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}")
    random = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * head_dim, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (INNER, HIDDEN),
        "blk.0.ffn_up.weight": (INNER, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INNER),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (len(TOKENS), HIDDEN),
    }
    # Small integers are exact in bfloat16, so that every comparison below is of equality.
    tensors = {name: random.integers(-128, 128, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["output_norm.weight"][:4] = [1 + 1 / 256, 1 + 3 / 256, -(1 + 1 / 256), 0.1]
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of model.safetensors, as float32."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("tiny")
    tensors = tiny_gguf(folder / "tiny.gguf")
    out = folder / "out"
    out.mkdir()
    convert_gguf(folder / "tiny.gguf", out)
    return out, tensors


def test_every_tensor_arrives_under_its_name(tiny: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, gguf = tiny
    got = read_tensors(folder)
    layer = "model.layers.0"
    same = {
        "model.embed_tokens.weight": "token_embd.weight",
        f"{layer}.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        f"{layer}.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        f"{layer}.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        f"{layer}.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        f"{layer}.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        f"{layer}.input_layernorm.weight": "blk.0.attn_norm.weight",
        f"{layer}.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, source in same.items():
        np.testing.assert_array_equal(got[name], gguf[source], err_msg=name)
    # A head of 4 rows stands as x0 y0 x1 y1 in the file, and as x0 x1 y0 y1 for transformers.
    rows = [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(got[f"{layer}.self_attn.q_proj.weight"], gguf["blk.0.attn_q.weight"][rows])
    np.testing.assert_array_equal(got[f"{layer}.self_attn.k_proj.weight"], gguf["blk.0.attn_k.weight"][rows[:4]])
    assert set(got) == {*same, f"{layer}.self_attn.q_proj.weight", f"{layer}.self_attn.k_proj.weight"} | {
        "model.norm.weight"
    }


def test_bfloat16_rounds_to_the_nearest_even(tiny: tuple[Path, dict[str, np.ndarray]]) -> None:
    # bfloat16 has steps of 2/256 above 1: 1 + 1/256 and 1 + 3/256 are ties; 0.1 is 205/2048 to 8 bits.
    got = read_tensors(tiny[0])["model.norm.weight"][:4]
    np.testing.assert_array_equal(got, np.float32([1.0, 1 + 4 / 256, -1.0, 205 / 2048]))


def test_the_configuration_says_what_the_metadata_said(tiny: tuple[Path, dict[str, np.ndarray]]) -> None:
    config = json.loads((tiny[0] / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "vocab_size": 9,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(("pre", "digits"), [("smollm", ["1", "2"]), ("gpt-2", ["12"])])
def test_the_tokenizer_splits_as_the_file_says(tmp_path: Path, pre: str, digits: list[str]) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", pre=pre)
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("ab12 b<|end|>a<tool>").tokens == ["ab", *digits, "Ġ", "b", "<|end|>", "a", "<tool>"]
    ids = tokenizer.encode("ab12 b<|end|><tool>").ids
    assert tokenizer.decode(ids) == "ab12 b<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "ab12 b<|end|><tool>"


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"architecture": "mamba"}, "'mamba'; only 'llama'"), ({"pre": "qwen2"}, "'qwen2'.*'gpt-2', 'smollm'")],
)
def test_another_kind_of_file_is_refused(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    tiny_gguf(tmp_path / "other.gguf", **changed)
    with pytest.raises(InputError, match=message):
        convert_gguf(tmp_path / "other.gguf", tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 20, 600, -40])
def test_a_cut_file_is_refused(tmp_path: Path, kept: int) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes()[:kept])
    with pytest.raises(InputError, match="cannot be read as a GGUF file"):
        convert_gguf(tmp_path / "cut.gguf", tmp_path)


@given(
    num_heads=st.integers(1, 4),
    half=st.integers(1, 4),
    position=st.integers(0, 1000),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_row_order_turns_one_rotation_into_the_other(num_heads: int, half: int, position: int, seed: int) -> None:
    """Rotating neighbours of the old rows equals rotating halves of the new rows, for any input and position."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(num_heads * 2 * half, 3))
    x = random.normal(size=3)
    neighbours = (weight @ x).reshape(num_heads, half, 2)
    halves = (rotary_rows_to_halves(weight, num_heads) @ x).reshape(num_heads, 2, half)
    for i in range(half):
        angle = position * 100.0 ** (-i / half)
        cos, sin = math.cos(angle), math.sin(angle)
        for head in range(num_heads):
            u, v = neighbours[head, i]
            p, q = halves[head, 0, i], halves[head, 1, i]
            assert (u * cos - v * sin, u * sin + v * cos) == pytest.approx((p * cos - q * sin, q * cos + p * sin))


# The embedded model itself, made once in the ordinary cache.


@pytest.fixture(scope="module")
def smol() -> Path:
    return prepare_model("embedded")


def test_the_embedded_model_is_ready_and_whole(smol: Path) -> None:
    assert smol == Path(resolve_model("embedded").path_or_id)
    assert damage_of(smol) is None


def test_embedded_tensors_equal_the_gguf_packages_own(smol: Path) -> None:
    quantized = {tensor.name: tensor for tensor in GGUFReader(embedded.gguf_path()).tensors}
    same = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.17.self_attn.v_proj.weight": "blk.17.attn_v.weight",
        "model.layers.29.input_layernorm.weight": "blk.29.attn_norm.weight",
    }
    assert quantized["blk.0.ffn_down.weight"].tensor_type is GGMLQuantizationType.Q4_1
    with safe_open(smol / "model.safetensors", framework="pt") as file:
        assert len(file.keys()) == len(quantized) == 272
        for name, source in same.items():
            got = file.get_tensor(name).float().numpy()
            expected = dequantize(quantized[source].data, quantized[source].tensor_type)
            assert got.shape == expected.shape
            # Half a unit in the last of bfloat16's 8 bits of mantissa.
            np.testing.assert_allclose(got, expected, rtol=2.0**-8, atol=0, err_msg=name)
        # Heads of 64 rows: row i of the first half was row 2i, row i of the second half was row 2i + 1.
        got = file.get_tensor("model.layers.5.self_attn.k_proj.weight").float().numpy()
        expected = dequantize(quantized["blk.5.attn_k.weight"].data, quantized["blk.5.attn_k.weight"].tensor_type)
        for row, gguf_row in {0: 0, 1: 2, 31: 62, 32: 1, 63: 63, 64: 64, 128 + 33: 128 + 3}.items():
            np.testing.assert_allclose(got[row], expected[gguf_row], rtol=2.0**-8, atol=0)


def test_the_embedded_tokenizer_knows_words_digits_and_turns(smol: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smol / "tokenizer.json"))
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("<|im_start|>user 42").tokens == ["<|im_start|>", "user", "Ġ", "4", "2"]
    text = "don't  élan\n\n\t日本 x² ½"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
