"""The pure parts of serving: engine arguments, memory check, metrics page, view of a reply, causes of failure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sparkray.config import AutoscalingConfig, EngineConfig, MetisConfig, ServeConfig
from sparkray.errors import UnavailableError
from sparkray.serving.app import deployment_options, llm_config_values
from sparkray.serving.chat_view import cusum_bar, entropy_style, live_view, report_lines, sparkline
from sparkray.serving.exposition import merge_expositions
from sparkray.serving.lifecycle import cause_of
from sparkray.serving.preflight import check_memory, kv_bytes_per_token
from sparkray.serving.trace_json import token_rows


def test_cpu_settings_become_an_llm_config() -> None:
    config = ServeConfig(
        engine=EngineConfig(kv_cache_gib=0.5, num_gpu_blocks_override=7), metis=MetisConfig(max_traces=9)
    )
    values = llm_config_values(config, model_path="dir", model_id="m", on_cpu=True)
    assert values["accelerator_config"] == {"kind": "cpu"}
    kwargs = values["engine_kwargs"]
    assert kwargs["kv_cache_memory_bytes"] == 536_870_912
    assert kwargs["num_gpu_blocks_override"] == 7
    assert "gpu_memory_utilization" not in kwargs
    assert values["experimental_configs"]["sparkray_metis"]["max_traces"] == 9


def test_tensor_parallelism_over_nodes_spreads_and_within_one_does_not() -> None:
    two = ServeConfig(engine=EngineConfig(tensor_parallel_size=2))
    over = llm_config_values(two, model_path="d", model_id="m", on_cpu=False, num_gpus_per_node=1)
    within = llm_config_values(two, model_path="d", model_id="m", on_cpu=False, num_gpus_per_node=2)
    assert over["placement_group_config"]["strategy"] == "SPREAD"
    assert "placement_group_config" not in within
    assert over["engine_kwargs"]["gpu_memory_utilization"] == 0.80


def test_replicas_or_autoscaling_never_both() -> None:
    fixed = deployment_options(ServeConfig(replicas=3))
    assert (fixed["num_replicas"], fixed["autoscaling_config"]) == (3, None)
    scaled = deployment_options(ServeConfig(autoscaling=AutoscalingConfig(min_replicas=1, max_replicas=4)))
    assert scaled["autoscaling_config"]["max_replicas"] == 4
    assert "num_replicas" not in scaled


def test_memory_is_counted_a_replica() -> None:
    config = ServeConfig(replicas=2, engine=EngineConfig(kv_cache_gib=1.0))
    need = 2 * (2**30 + 2**30 + 3 * 2**30)
    check_memory(config, num_weight_bytes=2**30, available_bytes=need, on_cpu=True)
    with pytest.raises(UnavailableError, match=r"needs 10\.0 GiB .* and 10\.0 GiB are free"):
        check_memory(config, num_weight_bytes=2**30, available_bytes=need - 1, on_cpu=True)
    check_memory(config, num_weight_bytes=2**40, available_bytes=1, on_cpu=False)


def test_kv_bytes_of_one_token(tmp_path: Path) -> None:
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    assert kv_bytes_per_token(tmp_path) == 2 * 30 * 3 * 64 * 2
    assert kv_bytes_per_token(tmp_path / "nowhere") == 0


def test_pages_of_two_replicas_become_one() -> None:
    page = '# HELP vllm:x Things\n# TYPE vllm:x gauge\nvllm:x{engine="0"} 2.0\n# HELP up Up\n# TYPE up gauge\nup 1\n'
    assert merge_expositions({"a": page, "b": page.replace("2.0", "3.0")}).splitlines() == [
        "# HELP vllm:x Things",
        "# TYPE vllm:x gauge",
        'vllm:x{replica="a",engine="0"} 2.0',
        'vllm:x{replica="b",engine="0"} 3.0',
        "# HELP up Up",
        "# TYPE up gauge",
        'up{replica="a"} 1',
        'up{replica="b"} 1',
    ]
    assert merge_expositions({}) == ""


def test_rows_name_the_action_and_show_no_nan() -> None:
    tokens_TF = np.array([[1.5, 0.9, 0.5, -0.25, 4.5, 0.0, 1, 1], [np.nan] * 6 + [0, 0]], dtype=np.float32)
    first, second = token_rows(tokens_TF, [7, 8], start=3, decode=lambda ids: f"<{ids[0]}>")
    assert (first["step"], first["text"], first["action"], first["boosted"]) == (3, "<7>", "hedge", True)
    assert first["entropy"] == 1.5
    assert second["entropy"] is None
    json.dumps([first, second], allow_nan=False)


def row(entropy: float, text: str = "x", statistic: float = 0.0, action: str = "generate") -> dict[str, object]:
    return {
        "step": 0,
        "text": text,
        "entropy": entropy,
        "confidence": 0.5,
        "z": 0.1,
        "hedge_statistic": statistic,
        "action": action,
    }


def test_colours_bar_and_line() -> None:
    assert [entropy_style(h) for h in (0.5, 0.51, 4.0, 4.1, None)] == [
        "green",
        "cyan",
        "dark_orange",
        "bold red",
        "dim",
    ]
    assert cusum_bar(2.0, threshold=4.0, width=8) == "████░░░░"
    assert cusum_bar(None, width=2) == "░░"
    assert sparkline([0.0, 6.0, 3.0]) == " █▄"
    assert sparkline([0, 6, 0, 0], width=2) == "█ "
    assert sparkline([]) == ""


def test_report_counts_and_names_the_least_sure_token() -> None:
    lines = report_lines([row(1.0), row(3.0, " maybe", 4.5, "hedge")])
    assert "tokens 2   mean entropy 2.00 bits" in lines[0]
    assert "hedges 1   refusals 0   peak CUSUM 4.50" in lines[1]
    assert "' maybe': 3.00 bits" in lines[2]
    assert report_lines([]) == ["no token was watched"]


def test_the_view_renders_with_and_without_tokens() -> None:
    console = Console(width=80, record=True, file=None)
    console.print(live_view([]))
    console.print(live_view([row(1.0, "hello")]))
    text = console.export_text()
    assert "waiting for the first token" in text
    assert "hello" in text


def test_the_cause_is_the_line_that_names_the_error() -> None:
    text = """Traceback (most recent call last):
  File "x.py", line 1
ray.exceptions.RayTaskError(ValueError): something
ValueError: No available memory for the cache blocks.
"""
    assert cause_of(text) == "ValueError: No available memory for the cache blocks."
    assert cause_of("no stack here") == "no stack here"


def test_the_cause_of_a_refused_setting_says_which_and_why() -> None:
    text = """  File "dataclasses.py", line 121, in __init__
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, max_model_len (100000) is greater than 8192. [type=value_error, input_value=ArgsKwargs((), {'a': 1}), \
input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error
The deployment failed to start 1 times in a row.
"""
    assert cause_of(text) == (
        "ValidationError: 1 validation error for ModelConfig: Value error, max_model_len (100000) is greater than 8192."
    )
