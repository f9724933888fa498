"""The shared cluster is what the tests of this folder take it for: two nodes that each run work and see each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.conftest import NUM_CPUS_PER_NODE, RayCluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_both_nodes_run_work_and_pass_objects(cluster: RayCluster, ray_connection: None) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote(num_cpus=1)
    def make() -> tuple[str, bytes]:
        return ray.util.get_node_ip_address(), bytes(300_000)

    @ray.remote(num_cpus=1)
    def measure(made: tuple[str, bytes]) -> tuple[str, str, int]:
        return made[0], ray.util.get_node_ip_address(), len(made[1])

    assert ray.cluster_resources()["CPU"] == 2 * NUM_CPUS_PER_NODE
    group = placement_group([{"CPU": 1}] * 2, strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=60)
    here, there = (PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in (0, 1))
    try:
        made = make.options(scheduling_strategy=here).remote()
        maker_ip, measurer_ip, num_bytes = ray.get(measure.options(scheduling_strategy=there).remote(made), timeout=120)
    finally:
        remove_placement_group(group)
    assert {maker_ip, measurer_ip} == {cluster.network.head_ip, cluster.network.node_ip}
    assert num_bytes == 300_000


def test_a_shell_that_took_the_variables_reaches_it_and_one_without_the_token_does_not(cluster: RayCluster) -> None:
    """As docs/operations.md says it, token traps included."""
    folder = Path(sys.executable).parent
    plain = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    plain["PATH"] = f"{folder}{os.pathsep}{plain['PATH']}"

    def shell(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script], env=plain, capture_output=True, text=True, timeout=120, check=False
        )

    variables = json.loads(shell("sparkray cluster env --name tests --json").stdout)
    assert variables == cluster.session.environment()
    token = Path(variables["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    listed = shell('eval "$(sparkray cluster env --name tests)" && ray job list')
    assert listed.returncode == 0, listed.stderr
    assert token not in listed.stdout + listed.stderr
    refused = shell(
        'eval "$(sparkray cluster env --name tests)"; unset RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH; ray job list'
    )
    assert refused.returncode != 0
    assert "401" in refused.stderr or "oken" in refused.stderr
