"""Two ranks make the step that one rank makes of the same groups: with summed gradients, and sharded by FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from grpo_shared_step import CANARY, NUM_GROUPS, one_step, step_config
from tiny_llama import tiny_llama

from sparkray.cluster.processes import free_port
from sparkray.grpo.policy import load_policy, shard
from sparkray.grpo.ranks import OneRank, ProcessGroupRanks

# Two interpreters load torch and transformers for it.
pytestmark = pytest.mark.slow

# Uneven on purpose: the second rank runs out of micro-batches first.
GROUPS_OF_RANK = ((0, 1, 2), (3,))


def rank_main(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for method in ("lora", "full"):
        for sharded in (False, True):
            config = step_config(method)
            policy = load_policy(Path(folder) / "model", config, torch.device("cpu"))
            if sharded:
                policy = shard(policy, num_ranks=2)
            report = one_step(policy, GROUPS_OF_RANK[rank], config, ProcessGroupRanks(sharded=sharded))
            weights = {name: value.clone() for name, value in policy.changed_weights(torch.float32)}
            scored = policy.score_text(CANARY)
            if rank == 0:
                name = f"{method}-{'fsdp' if sharded else 'summed'}"
                torch.save({"weights": weights, "report": report.to_dict(), "scored": scored}, f"{folder}/{name}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_llama(4).save_pretrained(str(folder / "model"))
    mp.spawn(rank_main, args=(free_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("way", ["summed", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_ranks_are_one(folder: Path, method: str, way: str) -> None:
    config = step_config(method)
    policy = load_policy(folder / "model", config, torch.device("cpu"))
    before = dict(policy.changed_weights(torch.float32))
    before = {name: value.clone() for name, value in before.items()}
    report = one_step(policy, range(NUM_GROUPS), config, OneRank()).to_dict()
    found = torch.load(folder / f"{method}-{way}.pt")
    expected = dict(policy.changed_weights(torch.float32))
    assert found["weights"].keys() == expected.keys()
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())
    for name, value in expected.items():
        torch.testing.assert_close(found["weights"][name], value, atol=2e-5, rtol=1e-4)
    for name in (
        "loss",
        "num_completions",
        "num_tokens",
        "entropy_nats",
        "grad_norm",
        "gap_max",
        "zero_variance_share",
    ):
        assert found["report"][name] == pytest.approx(report[name], rel=1e-3, abs=1e-5), name
    torch.testing.assert_close(found["scored"], policy.score_text(CANARY), atol=1e-4, rtol=1e-4)
