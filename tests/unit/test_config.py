"""Settings: merging, overrides, and refusals that say what was given and what is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparkray.config import ClusterConfig, ServeConfig, load_settings
from sparkray.errors import UsageError

CONFIGS = Path(__file__).parents[2] / "configs"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_later_files_values_and_overrides_win(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a.toml", 'model = "embedded"\nport = 1111\n[engine]\nmax_num_seqs = 4\nmax_model_len = 64\n'
    )
    second = write(tmp_path / "b.yaml", "port: 2222\nengine:\n  max_num_seqs: 5\n")
    settings = load_settings(ServeConfig, [first, second], ["engine.max_num_seqs=6"], {"replicas": 3})
    assert (settings.port, settings.replicas) == (2222, 3)
    assert (settings.engine.max_num_seqs, settings.engine.max_model_len) == (6, 64)


@pytest.mark.parametrize("path", sorted((CONFIGS / "serve").iterdir()), ids=lambda path: path.name)
def test_every_shipped_serve_file_is_accepted(path: Path) -> None:
    load_settings(ServeConfig, [path])


def test_an_unknown_key_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"prot: .*'port'|prot") as caught:
        load_settings(ServeConfig, overrides=["prot=1"])
    assert "model, model_id" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("port=99999", "port: "),
        ("engine.gpu_memory_utilization=.nan", "engine.gpu_memory_utilization"),
        ("metis.detector=clever", "metis.detector"),
        ("replicas=0", "replicas"),
        ("autoscaling={min_replicas: 3, max_replicas: 2}", "min_replicas (3) is above max_replicas (2)"),
        ("noequals", "KEY=VALUE is expected"),
    ],
)
def test_a_refused_value_is_named_with_what_was_given(override: str, fragment: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_settings(ServeConfig, overrides=[override])
    assert fragment in str(caught.value)


def test_files_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_settings(ServeConfig, [tmp_path / "missing.toml"])
    with pytest.raises(UsageError, match="is not valid toml"):
        load_settings(ServeConfig, [write(tmp_path / "bad.toml", "port = = 1")])
    with pytest.raises(UsageError, match="holds a list"):
        load_settings(ServeConfig, [write(tmp_path / "list.yaml", "- 1")])


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ClusterConfig().port = 1  # type: ignore[misc]
