"""A policy that FSDP shards makes the step, and pushes the weights, of one that it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from grpo_shared_step import CANARY, NUM_GROUPS, one_step, step_config
from tiny_llama import tiny_llama

from sparkray.cluster.processes import free_port
from sparkray.grpo.policy import load_policy, shard
from sparkray.grpo.ranks import OneRank, ProcessGroupRanks


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model, in a process group of this process alone."""
    path = tmp_path_factory.mktemp("model")
    tiny_llama(4).save_pretrained(str(path))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield path
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_sharded_policy_makes_the_same_step(model_path: Path, method: str) -> None:
    config = step_config(method)
    plain = load_policy(model_path, config, torch.device("cpu"))
    sharded = shard(load_policy(model_path, config, torch.device("cpu")), num_ranks=1)
    before = {name: value.clone() for name, value in plain.changed_weights(torch.float32)}
    expected = one_step(plain, range(NUM_GROUPS), config, OneRank()).to_dict()
    found = one_step(sharded, range(NUM_GROUPS), config, ProcessGroupRanks(sharded=True)).to_dict()
    for name in ("loss", "num_completions", "num_tokens", "entropy_nats", "grad_norm", "gap_max"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    weights = dict(sharded.changed_weights(torch.float32))
    moved = dict(plain.changed_weights(torch.float32))
    assert weights.keys() == moved.keys()
    assert any(not torch.equal(value, before[name]) for name, value in moved.items())
    for name, value in moved.items():
        torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(sharded.score_text(CANARY), plain.score_text(CANARY), atol=1e-4, rtol=1e-4)
