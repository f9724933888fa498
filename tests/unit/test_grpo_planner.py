"""The planner against numbers computed by hand, and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparkray.cli.main import app
from sparkray.errors import InputError, NotFoundError
from sparkray.grpo.planner import Workload, alternatives, find_shape, plan_run, shape_of_config

SMALL = Workload(num_prompts=8, num_generations=8, prompt_tokens=128, completion_tokens=256)


def test_7b_full_fits_on_two_sparks_and_not_on_one() -> None:
    shape = find_shape("7B")
    two = plan_run(shape, method="full", num_nodes=2, workload=SMALL)
    assert two.fits
    # AdamW 7.6e9 * 16 / 2, the engine's weights whole on each node, its KV cache in halves, activations.
    kv = 2 * 28 * 4 * 128 * 2 * 64 * 384
    assert two.trainer.needed_bytes_per_node == pytest.approx(7.6e9 * 8 + 7.6e9 * 2 + kv / 2 + 4e9)
    assert not plan_run(shape, method="full", num_nodes=1, workload=SMALL).fits
    assert plan_run(shape, method="lora", num_nodes=1, workload=SMALL).fits


def test_32b_lora_fits_apart_on_two() -> None:
    shape = find_shape("Qwen/Qwen2.5-32B-Instruct")
    assert shape.num_params == 32.8e9
    apart = plan_run(shape, method="lora", num_nodes=2, layout="apart", workload=SMALL)
    assert apart.fits
    assert apart.trainer.needed_bytes_per_node == pytest.approx(32.8e9 * 2 + 4e9 + 32.8e9 * 0.16)
    assert not plan_run(shape, method="lora", num_nodes=1, workload=SMALL).fits


def test_72b_bf16_is_refused_on_one_spark_and_on_two_with_an_engine_in_bf16() -> None:
    shape = find_shape("72B")
    assert not plan_run(shape, method="lora", num_nodes=1, workload=SMALL).fits
    both = plan_run(shape, method="lora", num_nodes=2, workload=SMALL)
    assert not both.fits
    assert both.trainer.needed_bytes_per_node > 145e9
    assert "does not fit" in both.why
    assert plan_run(shape, method="qlora", num_nodes=2, layout="apart", engine_bits=4, workload=SMALL).fits
    assert {plan.method for plan in alternatives(shape, max_nodes=2, workload=SMALL)} >= {"qlora"}


def test_14b_full_does_not_fit_on_two() -> None:
    assert not plan_run(find_shape("14B"), method="full", num_nodes=2, workload=SMALL).fits


def test_alternatives_fit_and_more_nodes_only_add() -> None:
    shape = find_shape("72B")
    two, four = (alternatives(shape, max_nodes=nodes, workload=SMALL) for nodes in (2, 4))
    assert all(plan.fits for plan in four)
    assert {plan.title for plan in two} <= {plan.title for plan in four}


def test_a_step_takes_longer_where_it_does_more() -> None:
    shape = find_shape("7B")
    short = plan_run(shape, method="full", num_nodes=2, workload=SMALL).step_seconds
    long = plan_run(shape, method="full", num_nodes=2, workload=Workload(8, 8, 128, 512)).step_seconds
    assert long["train"] == pytest.approx(short["train"] * (8 * 128 + 64 * 512) / (8 * 128 + 64 * 256))
    assert long["generate"] > 1.9 * short["generate"]
    # 6 N operations a token at 35 % of 104 TFLOP/s on two nodes.
    assert short["train"] == pytest.approx(6 * 7.6e9 * (8 * 128 + 64 * 256) / (2 * 0.35 * 104e12))
    assert short["total"] == pytest.approx(sum(value for name, value in short.items() if name != "total"))


def test_shapes_from_a_configuration() -> None:
    # SmolLM2-135M: 134,515,008 parameters as published.
    config: dict[str, object] = {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    assert shape_of_config("x", config).num_params == 134_515_008
    with pytest.raises(InputError, match="hidden_size"):
        shape_of_config("x", {})


def test_unknown_models_and_impossible_layouts_are_refused() -> None:
    with pytest.raises(NotFoundError, match="72B"):
        find_shape("something-9000")
    with pytest.raises(InputError, match="only one node"):
        plan_run(find_shape("7B"), method="lora", num_nodes=1, layout="apart")


def test_the_command_refuses_and_says_what_fits(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["plan", "--model", "72B", "--method", "lora", "--nodes", "1", "--json"])
    assert done.exit_code == 3
    told = json.loads(done.stdout)
    assert told["fits"] is False
    assert told["plans"][0]["needed_gb_per_node"] > told["plans"][0]["usable_gb_per_node"]
    assert told["alternatives"] and all(plan["fits"] for plan in told["alternatives"])
    done = CliRunner().invoke(app, ["plan", "--model", "7B", "--method", "full", "--nodes", "2"])
    assert done.exit_code == 0
    assert "fits" in done.stdout and "s a step" in done.stdout
