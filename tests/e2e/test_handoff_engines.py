"""Real MLX and real llama.cpp: rows of one continue in the other, and every known trap is caught before a token."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handoff_tiny import VOCABULARY, write_tiny

from sparkray.config.handoff import DecodeConfig
from sparkray.handoff.canary import EXACT, QUANTISED, run_canary
from sparkray.handoff.engine import create_engine
from sparkray.handoff.errors import ProtocolError
from sparkray.handoff.fingerprint import compare_identities
from sparkray.handoff.llama_layout import RowAdapter
from sparkray.handoff.rows import KvRows

pytest.importorskip("mlx_lm")
pytest.importorskip("llama_cpp")

KINDS = ("llama", "qwen3_moe")
NUM_TOKENS = 96


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARKRAY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {kind: write_tiny(root / kind, kind) for kind in KINDS}


def open_engine(engine: str, folder: Path, **settings: Any) -> Any:
    values = {"engine": engine, "model": str(folder), "context_tokens": 512, "max_sequences": 2, "num_threads": 1}
    return create_engine(DecodeConfig(**{**values, **settings}))


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[tuple[str, str], Any]:
    return {(name, kind): open_engine(name, folders[kind]) for name in ("mlx", "llamacpp") for kind in KINDS}


def prompt_of(length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(length).integers(0, VOCABULARY, length)]


def rows_of(engine: Any, prompt: list[int]) -> KvRows:
    sequence = engine.open_sequence()
    sequence.forward(prompt)
    rows: KvRows = sequence.export_rows(0, len(prompt) - 1)
    sequence.close()
    return rows


def chunks_of(rows: KvRows, size: int) -> list[KvRows]:
    return [
        KvRows(
            first, rows.dtype,
            tuple(keys[first : first + size] for keys in rows.keys_L),
            tuple(values[first : first + size] for values in rows.values_L),
        )
        for first in range(0, rows.count, size)
    ]  # fmt: skip


def write(engine: Any, prompt: list[int], rows: list[KvRows]) -> list[int]:
    sequence = engine.open_sequence()
    for part in rows:
        sequence.import_rows(part)
    logits = sequence.forward(prompt[sequence.num_rows :])
    answer = []
    for _ in range(NUM_TOKENS):
        answer.append(int(logits.argmax()))
        logits = sequence.forward(answer[-1:])
    sequence.close()
    return answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "target"), [("mlx", "llamacpp"), ("llamacpp", "mlx")])
@pytest.mark.parametrize("length", [19, 200])
def test_rows_of_one_engine_continue_in_the_other(
    engines: dict[tuple[str, str], Any], kind: str, source: str, target: str, length: int
) -> None:
    prompt = prompt_of(length)
    here, there = engines[target, kind], engines[source, kind]
    compare_identities(there.identity, here.identity)
    handed = write(here, prompt, chunks_of(rows_of(there, prompt), 64))
    assert handed == write(here, prompt, []) == write(there, prompt, [])


def test_a_conversation_is_cut_back_and_goes_on(engines: dict[tuple[str, str], Any]) -> None:
    for engine in engines.values():
        prompt = prompt_of(50)
        expected = write(engine, prompt, [])
        sequence = engine.open_sequence()
        sequence.forward(prompt[:40] + prompt_of(9))
        sequence.truncate(40)
        assert sequence.num_rows == 40
        assert int(sequence.forward(prompt[40:]).argmax()) == expected[0]
        sequence.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_canary_passes_the_true_rows(engines: dict[tuple[str, str], Any], kind: str) -> None:
    prompt = prompt_of(96)
    rows = rows_of(engines["mlx", kind], prompt)
    report = run_canary(engines["llamacpp", kind], prompt, [rows], EXACT)
    assert report.passed and report.keys_error < 1e-4 and report.top1_share == 1


def planted(rows: KvRows, keys: Any = lambda array: array, values: Any = lambda array: array) -> KvRows:
    return replace(rows, keys_L=tuple(map(keys, rows.keys_L)), values_L=tuple(map(values, rows.values_L)))


def permute(keys: Any) -> Any:
    T, H, D = keys.shape
    return np.ascontiguousarray(keys.reshape(T, H, 2, D // 2).swapaxes(2, 3)).reshape(T, H, D)


def transposed_page(keys: Any) -> Any:
    """A page's key plane read token by token where it lies channel by channel."""
    T, H, D = keys.shape
    return np.ascontiguousarray(keys.transpose(1, 2, 0)).reshape(H, T, D).transpose(1, 0, 2).copy()


FAULTS = {
    "keys permuted": {"keys": permute},
    "rows shifted by one": {"keys": lambda a: np.roll(a, 1, axis=0), "values": lambda a: np.roll(a, 1, axis=0)},
    "another layout of pages": {"keys": transposed_page},
    "heads exchanged": {"values": lambda a: a[:, ::-1].copy()},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", ["mlx", "llamacpp"])
def test_the_canary_catches(engines: dict[tuple[str, str], Any], target: str, fault: str) -> None:
    prompt = prompt_of(96)
    source = engines["llamacpp" if target == "mlx" else "mlx", "llama"]
    report = run_canary(engines[target, "llama"], prompt, [planted(rows_of(source, prompt), **FAULTS[fault])], EXACT)
    assert not report.passed
    # By a wide margin: with 4-bit weights on the decode side it would be caught as well.
    assert max(report.keys_error, report.values_error) > QUANTISED.rows


def test_a_permutation_that_gguf_needs_and_does_not_get_is_caught(engines: dict[tuple[str, str], Any]) -> None:
    engine, prompt = engines["llamacpp", "llama"], prompt_of(96)
    rows = rows_of(engines["mlx", "llama"], prompt)
    true = engine._adapter
    engine._adapter = replace(true, pairs_adjacent=False)
    try:
        assert not run_canary(engine, prompt, [rows], QUANTISED).passed
    finally:
        engine._adapter = true


def test_a_quantised_cache_that_is_not_turned_is_caught(
    engines: dict[tuple[str, str], Any], folders: dict[str, Path]
) -> None:
    prompt = prompt_of(96)
    rows = rows_of(engines["mlx", "llama"], prompt)
    engine = open_engine("llamacpp", folders["llama"], kv_type="q8_0")
    turned = run_canary(engine, prompt, [rows], QUANTISED)
    assert turned.passed, turned
    engine._adapter = RowAdapter.create(
        pairs_adjacent=True, head_dim=64, key_type="q8_0", value_type="q8_0", turned=False
    )
    assert not run_canary(engine, prompt, [rows], QUANTISED).passed
    engine.close()


def test_another_rotary_base_is_caught_by_the_fingerprint(engines: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "base", "llama", rope_theta=10_000.0, rope_parameters=None)
    for name in ("mlx", "llamacpp"):
        with pytest.raises(ProtocolError, match="frequencies"):
            compare_identities(engines["mlx", "llama"].identity, open_engine(name, other).identity)


def test_mlx_turns_by_the_base_that_transformers_5_writes(
    engines: dict[tuple[str, str], Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """mlx-lm's llama reads `rope_theta` alone, and falls back to 10,000 in silence where it is not handed on."""
    folder = write_tiny(tmp_path / "five", "llama")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    engine = open_engine("mlx", folder)
    compare_identities(engine.identity, engines["llamacpp", "llama"].identity)
    prompt = prompt_of(40)
    assert write(engine, prompt, []) == write(engines["llamacpp", "llama"], prompt, [])


def test_a_loaded_model_that_turns_otherwise_is_caught(
    monkeypatch: pytest.MonkeyPatch, engines: dict[tuple[str, str], Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """The identity is measured on the loaded model: had the base been lost on the way, it would show."""
    import sparkray.handoff.mlx_engine as module

    folder = write_tiny(tmp_path / "lost", "llama")
    monkeypatch.setattr(module, "_for_mlx", lambda config: {"rope_theta": 10_000.0})
    with pytest.raises(ProtocolError, match="frequencies"):
        compare_identities(engines["llamacpp", "llama"].identity, open_engine("mlx", folder).identity)


def test_stale_weights_are_caught(engines: dict[tuple[str, str], Any], tmp_path: Path) -> None:
    stale = open_engine("mlx", write_tiny(tmp_path / "stale", "llama", seed=1))
    with pytest.raises(ProtocolError, match="lineage"):
        compare_identities(stale.identity, engines["llamacpp", "llama"].identity)
    # Even where someone vouches for the lineage, the probe tells.
    prompt = prompt_of(96)
    assert not run_canary(engines["llamacpp", "llama"], prompt, [rows_of(stale, prompt)], QUANTISED).passed
