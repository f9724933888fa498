"""Every shipped file of the handoff is accepted, and refusals say what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkray.config.base import load_settings, validate_settings
from sparkray.config.handoff import DecodeConfig, HandoffConfig, ModelShape, PrefillConfig
from sparkray.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_shipped_files_are_accepted() -> None:
    mac = load_settings(DecodeConfig, [ROOT / "configs/handoff/mac.toml"])
    spark = load_settings(PrefillConfig, [ROOT / "configs/handoff/spark.toml"])
    assert mac.tls is not None and spark.tls is not None
    assert (mac.tls.authority, spark.tls.authority) == (spark.tls.certificate, mac.tls.certificate)
    served = yaml.safe_load((ROOT / "serve_apps/handoff.yaml").read_text())["applications"][0]
    assert validate_settings(HandoffConfig, served["args"]).prefill.codec == "auto"


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (DecodeConfig, {"engine": "ollama"}, "'mlx' or 'llamacpp'"),
        (DecodeConfig, {"kv_type": "int8"}, "q8_0"),
        (PrefillConfig, {"codec": "zip"}, "k4v4"),
        (HandoffConfig, {"peers": [], "secret_file": "s"}, "peers"),
    ],
)
def test_refusals_name_what_is_accepted(kind: Any, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        validate_settings(kind, values)


def test_bytes_of_a_token_follow_the_cache_type() -> None:
    # 2 x 3 layers x 4 heads x 5 channels x 16 / 8 bytes
    shape = ModelShape(name="s", num_layers=3, num_kv_heads=4, head_dim=5, active_params=1)
    assert shape.kv_bytes_per_token == 240
    assert shape.model_copy(update={"kv_bits": 32}).kv_bytes_per_token == 480
