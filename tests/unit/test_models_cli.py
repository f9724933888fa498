"""`sparkray models`: answers on stdout, exit codes, and nothing written by a question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparkray.cli import models
from sparkray.cli.main import app
from sparkray.errors import NotFoundError

runner = CliRunner()


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, the hub switched off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SPARKRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def local_model(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_list_says_what_is_prepared(caches: Path) -> None:
    assert runner.invoke(app, ["models", "list"]).stdout == "embedded\tembedded\tnot prepared\n"
    answer = json.loads(runner.invoke(app, ["models", "list", "--json"]).stdout)
    expected = {"name": "embedded", "model_id": "SmolLM2-135M-Instruct", "kind": "embedded", "path": None}
    assert answer == {"models": [expected]}
    assert not (caches / "cache").exists()


@pytest.mark.parametrize("verb", ["prepare", "where"])
def test_a_local_model_is_where_it_is(local_model: Path, verb: str) -> None:
    assert runner.invoke(app, ["models", verb, str(local_model)]).stdout == f"{local_model}\n"
    answer = json.loads(runner.invoke(app, ["models", verb, str(local_model), "--json"]).stdout)
    assert answer == {"name": str(local_model), "model_id": "mine", "kind": "local", "path": str(local_model)}


def test_where_of_a_model_that_is_not_prepared_says_how_to(caches: Path) -> None:
    result = runner.invoke(app, ["models", "where", "embedded"])
    assert isinstance(result.exception, NotFoundError)
    assert str(result.exception).endswith("Run: sparkray models prepare embedded")
    assert not (caches / "cache").exists()


@pytest.mark.parametrize("verb", ["prepare", "where"])
def test_an_unknown_model_is_refused(verb: str) -> None:
    result = runner.invoke(app, ["models", verb, "embeddd"])
    assert isinstance(result.exception, NotFoundError)
    assert "Did you mean 'embedded'?" in str(result.exception)
    assert result.stdout == ""


def test_without_a_verb_there_is_help() -> None:
    result = runner.invoke(models.app, [])
    assert all(verb in result.output for verb in ("list", "prepare", "where"))
