"""Layouts: small pages and states written out by hand; frequencies and fingerprints against published numbers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparkray.config.poc import ModelParams
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.fingerprint import compare_identities, identity_from_wire, identity_of_config, lineage_hash
from sparkray.handoff.llama_layout import (
    RowAdapter,
    build_state,
    halves_to_pairs,
    parse_state,
    read_layer,
    session_file,
    turn,
)
from sparkray.handoff.model_files import folder_lineage, folder_tokenizer
from sparkray.handoff.paged_layout import PageLayout, check_page, read_rows
from sparkray.handoff.rope import inverse_frequencies
from sparkray.handoff.rows import from_float32
from sparkray.handoff.tickets import TicketBook, sign_ticket
from sparkray.poc.rope import rope_frequencies


def page(layout: PageLayout) -> torch.Tensor:
    """3 blocks, 1 head, 2 tokens, D = 2. Key of block b, token t, channel d: 100 b + 10 t + d; values negative."""
    blocks = []
    for b in range(3):
        keys = [[100 * b + 10 * t + d + 1 for d in range(2)] for t in range(2)]
        values = [[-key for key in row] for row in keys]
        if layout is PageLayout.TOKEN_PAIRS:
            flat = [*keys[0], *values[0], *keys[1], *values[1]]
        elif layout is PageLayout.PLANES:
            flat = [*keys[0], *keys[1], *values[0], *values[1]]
        else:
            flat = [keys[0][0], keys[1][0], keys[0][1], keys[1][1], *values[0], *values[1]]
        blocks.append(flat)
    return torch.tensor(blocks, dtype=torch.float32).reshape(3, 1, 2, 4)


@pytest.mark.parametrize("layout", list(PageLayout))
def test_rows_come_out_of_pages(layout: PageLayout) -> None:
    # The request's blocks are 2, 0, 1; tokens 1 to 3 lie in block 2 (token 1) and block 0 (tokens 0, 1).
    keys, values = read_rows(page(layout), layout, [2, 0, 1], start=1, count=3)
    assert keys[:, 0].tolist() == [[211, 212], [1, 2], [11, 12]]
    assert values[:, 0].tolist() == [[-211, -212], [-1, -2], [-11, -12]]


def test_a_wrong_layout_reads_other_numbers() -> None:
    keys, _ = read_rows(page(PageLayout.PLANES), PageLayout.TOKEN_PAIRS, [0], 0, 2)
    assert keys[:, 0].tolist() != [[1, 2], [11, 12]]


def test_a_cache_of_another_form_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"shape \(2, 3, 4\)"):
        check_page(torch.zeros(2, 3, 4))


def test_rotary_pairs_become_neighbours() -> None:
    keys = np.arange(8, dtype=np.float32).reshape(1, 1, 8)
    assert halves_to_pairs(keys).ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_hadamard_by_hand() -> None:
    # Rows of H4 / 2: (1,1,1,1), (1,-1,1,-1), (1,1,-1,-1), (1,-1,-1,1), halved.
    rows = np.array([[1, 2, 3, 4]], np.float32)
    assert turn(rows, 4).tolist() == [[5, -1, -2, 0]]
    assert np.allclose(turn(turn(np.eye(64, dtype=np.float32), 64), 64), np.eye(64), atol=1e-6)


def hand_state(transposed: bool) -> bytes:
    """One layer, two rows at positions 5 and 6, two channels, float32."""
    cells = struct.pack("<iIi", 5, 1, 0) + struct.pack("<iIi", 6, 1, 0)
    keys = struct.pack("<iQ", 0, 8) + struct.pack("<4f", 1, 2, 3, 4)
    if transposed:
        values = struct.pack("<iII", 0, 4, 2) + struct.pack("<4f", -1, -3, -2, -4)
    else:
        values = struct.pack("<iQ", 0, 8) + struct.pack("<4f", -1, -2, -3, -4)
    return b"PREFIX!!" + struct.pack("<II", 1, 2) + cells + struct.pack("<II", transposed, 1) + keys + values


@pytest.mark.parametrize("transposed", [False, True])
def test_states_are_read_and_written_alike(transposed: bool) -> None:
    data = hand_state(transposed)
    state = parse_state(data)
    assert state.positions == (5, 6)
    keys, values = read_layer(state, 0)
    assert keys.tolist() == [[1, 2], [3, 4]] and values.tolist() == [[-1, -2], [-3, -4]]
    assert build_state(state.form, [keys], [values], start=5) == data


@pytest.mark.parametrize("change", ["short", "long", "streams", "type"])
def test_a_state_of_another_form_is_refused(change: str) -> None:
    data = bytearray(hand_state(False))
    if change == "short":
        del data[-1]
    elif change == "long":
        data += b"\0"
    elif change == "streams":
        data[8] = 2
    else:
        data[48] = 77
    with pytest.raises(ProtocolError) as caught:
        parse_state(bytes(data))
    assert caught.value.reason is Reason.UNSUPPORTED


def test_a_session_file_leaves_the_prefix_out() -> None:
    data = session_file(hand_state(False), [7, 9])
    assert data == struct.pack("<IIIii", 0x67677371, 3, 2, 7, 9) + hand_state(False)[8:]


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_the_adapter_undoes_itself(kind: str) -> None:
    adapter = RowAdapter.create(pairs_adjacent=True, head_dim=96, key_type=kind, value_type=kind, turned=True)
    assert (adapter.key_turn, adapter.value_turn) == ((1, 1) if kind == "f32" else (32, 64))
    draw = np.random.default_rng(0)
    keys, values = (draw.standard_normal((3, 2, 96)).astype(np.float32) for _ in range(2))
    back = adapter.to_canonical(*adapter.to_context(keys, values), 2)
    assert np.allclose(back[0], keys, atol=1e-5) and np.allclose(back[1], values, atol=1e-5)


CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8,
    "rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip


def test_frequencies_by_hand() -> None:
    assert inverse_frequencies(CONFIG, 4).tolist() == pytest.approx([1, 0.01])
    linear = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert inverse_frequencies(linear, 4).tolist() == pytest.approx([0.25, 0.0025])


def test_llama3_scaling_agrees_with_proof_of_compute() -> None:
    """Two implementations of the rule that were written apart."""
    params = ModelParams(dim=128, n_heads=1, n_kv_heads=1, rope_theta=500_000.0, use_scaled_rope=True)
    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    ours = inverse_frequencies({"rope_parameters": parameters}, 128)
    assert np.allclose(ours, rope_frequencies(params).numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "said"),
    [({}, "no rotary bases"), ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e5}}, "10000.0, 100000.0"),
     ({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn"}}, "'yarn' is not supported")],
)  # fmt: skip
def test_unclear_rotation_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        inverse_frequencies(config, 64)


def identity(**changes: Any) -> Any:
    values = {"tokenizer": "t", "lineage": "l", "weights": "bfloat16", "engine": "e"}
    split = {key: changes.pop(key) for key in list(changes) if key in values}
    return identity_of_config({**CONFIG, **changes}, **{**values, **split})


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"rope_theta": 1e5, "rope_parameters": None}, "frequencies"), ({"tokenizer": "u"}, "tokenizer"),
     ({"lineage": "stale"}, "lineage"), ({"num_hidden_layers": 2}, "num_layers"),
     ({"model_type": "qwen2"}, "architecture")],
)  # fmt: skip
def test_models_that_differ_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ProtocolError, match=said) as caught:
        compare_identities(identity(**changes), identity())
    assert caught.value.reason is Reason.FINGERPRINT


def test_weights_and_engines_may_differ() -> None:
    compare_identities(identity(weights="Q4_1", engine="x"), identity())
    assert identity(weights="Q4_1").digest == identity().digest != identity(lineage="stale").digest
    assert identity_from_wire(json.loads(json.dumps(identity().to_wire()))) == identity()


@pytest.mark.parametrize(
    "config",
    [{"kv_lora_rank": 512}, {"sliding_window": 4096}, {"model_type": "mamba2"}],
)
def test_other_caches_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError) as caught:
        identity(**config)
    assert caught.value.reason is Reason.UNSUPPORTED


def write_folder(folder: Path, dtype: str, gain: float) -> Path:
    names = [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    ]
    arrays = {name: np.full(4, gain + index, np.float32) for index, name in enumerate(names)}
    kind = {"BF16": "bfloat16", "F32": "float32"}[dtype]
    bodies = {name: from_float32(array, kind).tobytes() for name, array in arrays.items()}  # type: ignore[arg-type]
    header, offset = {}, 0
    for name, body in bodies.items():
        header[name] = {"dtype": dtype, "shape": [4], "data_offsets": [offset, offset + len(body)]}
        offset += len(body)
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"".join(bodies.values()))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_lineage_outlives_the_type_of_the_weights(tmp_path: Path) -> None:
    gains = [np.full(4, 1.5 + index, np.float32) for index in range(3)]
    assert folder_lineage(write_folder(tmp_path / "a", "BF16", 1.5)) == lineage_hash(gains)
    assert folder_lineage(write_folder(tmp_path / "b", "F32", 1.5)) == lineage_hash(gains)
    assert folder_lineage(write_folder(tmp_path / "c", "F32", 1.6)) != lineage_hash(gains)


def test_a_tokenizer_is_known_by_its_tokens(tmp_path: Path) -> None:
    def hashed(vocab: dict[str, int], added: list[dict[str, Any]]) -> str:
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
        return folder_tokenizer(tmp_path)

    assert folder_tokenizer(tmp_path) == "none"
    one = hashed({"a": 0, "b": 1}, [{"id": 2, "content": "<s>"}])
    assert one == hashed({"b": 1, "a": 0, "<s>": 2}, []) != hashed({"b": 0, "a": 1}, [{"id": 2, "content": "<s>"}])


SECRET = b"0123456789abcdef"


@pytest.mark.parametrize(
    ("change", "reason"),
    [("none", None), ("request", Reason.TICKET), ("prompt", Reason.TICKET), ("signature", Reason.TICKET),
     ("form", Reason.TICKET), ("late", Reason.TICKET), ("secret", Reason.TICKET), ("again", Reason.REPLAYED)],
)  # fmt: skip
def test_tickets(change: str, reason: Reason | None) -> None:
    book = TicketBook(SECRET)
    ticket = sign_ticket(SECRET if change != "secret" else b"another secret of 16", "r", "p", expires_at=1000)
    if change == "signature":
        ticket = ticket[:-1] + ("0" if ticket[-1] != "0" else "1")
    if change == "form":
        ticket = "x" + ticket
    if change == "again":
        book.check(ticket, "r", "p", now=900)
        book.finish("r", ticket, now=900)
    arguments = ("q" if change == "request" else "r", "x" if change == "prompt" else "p")
    now = 1001 if change == "late" else 999
    if reason is None:
        book.check(ticket, *arguments, now=now)
        return
    with pytest.raises(ProtocolError) as caught:
        book.check(ticket, *arguments, now=now)
    assert caught.value.reason is reason


def test_finished_requests_are_forgotten_when_their_tickets_are_void() -> None:
    book = TicketBook(SECRET, capacity=2)
    for number in range(3):
        book.finish(f"r{number}", sign_ticket(SECRET, f"r{number}", "p", expires_at=1000 + number), now=0)
    assert list(book._finished) == ["r1", "r2"]
    book.finish("r3", sign_ticket(SECRET, "r3", "p", expires_at=2000), now=1500)
    assert list(book._finished) == ["r3"]
