"""What a model's name means, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkray.errors import InputError, MissingExtraError, NotFoundError
from sparkray.models import EMBEDDED, ModelKind, embedded, list_models, prepare_model, ready_path, resolve_model


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and an empty sparkray cache, the hub switched off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SPARKRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path


def cache_hub_model(root: Path, hub_id: str) -> Path:
    """What huggingface_hub leaves behind after a download."""
    repository = root / "hub" / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    return snapshot


def test_embedded_is_named_without_being_made(caches: Path) -> None:
    source = resolve_model(EMBEDDED)
    assert (source.kind, source.model_id) == (ModelKind.EMBEDDED, "SmolLM2-135M-Instruct")
    assert Path(source.path_or_id).is_relative_to(caches / "cache")
    assert ready_path(source) is None
    assert not (caches / "cache").exists()


def test_embedded_without_its_wheel_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_DISTRIBUTION", "no-such-distribution")
    with pytest.raises(MissingExtraError, match=r"sparkray\[embedded\]"):
        resolve_model(EMBEDDED)


def test_a_directory_is_local_and_takes_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org" / "my-model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in (str(folder), "org/my-model", "./org/my-model", "org/my-model/"):
        source = resolve_model(name)
        assert (source.kind, source.path_or_id, source.model_id) == (ModelKind.LOCAL, str(folder), "my-model")
        assert prepare_model(name) == folder == ready_path(source)


def test_a_directory_without_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"no config\.json \(it holds weights\.gguf\)"):
        resolve_model(str(tmp_path))


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="is a file, and a directory is expected"):
        resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("name", "meant"),
    [("embeded", "'embedded'"), ("Embedded", "'embedded'"), ("org/Modell-7B", "'org/Model-7B'")],
)
def test_a_misspelt_name_gets_its_close_match(caches: Path, name: str, meant: str) -> None:
    cache_hub_model(caches, "org/Model-7B")
    with pytest.raises(NotFoundError) as raised:
        resolve_model(name)
    assert repr(name) in str(raised.value)
    assert f"Did you mean {meant}?" in str(raised.value)
    assert "Accepted: 'embedded', a directory that holds config.json, or a hub id" in str(raised.value)


def test_a_misspelt_path_gets_its_sibling(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-100").mkdir()
    with pytest.raises(NotFoundError, match=r"no such directory.*Did you mean '.*/checkpoint-100'"):
        resolve_model(str(tmp_path / "checkpoint-10"))


@pytest.mark.parametrize("name", ["", " ", "a" * 5000, "/" + "a" * 5000, "nul\0byte", "org/na me", "a/b/c"])
def test_odd_names_are_not_found_and_nothing_worse(name: str) -> None:
    with pytest.raises(NotFoundError):
        resolve_model(name)


def test_a_hub_id_offline_needs_the_local_cache(caches: Path) -> None:
    with pytest.raises(NotFoundError, match=r"'org/Model-7B'.*HF_HUB_OFFLINE=1.*local cache"):
        resolve_model("org/Model-7B")
    snapshot = cache_hub_model(caches, "org/Model-7B")
    source = resolve_model("org/Model-7B")
    assert (source.kind, source.path_or_id, source.model_id) == (ModelKind.HUB, "org/Model-7B", "org/Model-7B")
    assert ready_path(source) == snapshot == prepare_model("org/Model-7B")


def test_a_hub_id_online_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert resolve_model("org/Model-7B").kind is ModelKind.HUB


def test_list_models_names_what_needs_no_download(caches: Path) -> None:
    assert [source.name for source in list_models()] == ["embedded"]
    cache_hub_model(caches, "zeta/b")
    cache_hub_model(caches, "alpha/a--b")
    assert [source.name for source in list_models()] == ["embedded", "alpha/a--b", "zeta/b"]
