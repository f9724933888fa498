"""The shipped cluster.yaml: Ray's own checks, ours, the commands made of it, and ssh replaced by a script."""

from __future__ import annotations

import copy
import os
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparkray.cluster.cluster_file import NODE_VARIABLES, problems, read_cluster_file
from sparkray.cluster.launch import LaunchError, NodeCommand, commands_for, launch, run_on_node
from sparkray.cluster.preflight import PROBE, judge_node, judge_together, parse_probe
from sparkray.errors import NotFoundError, UnavailableError, UsageError, WaitTimeoutError

FILE = Path(__file__).parents[2] / "cluster.yaml"
HEAD, WORKER = "192.168.100.10", "192.168.100.11"
AUTH = {"ssh_user": "nvidia"}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return read_cluster_file(FILE)


def test_ray_prepares_and_validates_the_file(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    node_type = prepared["available_node_types"]["local.cluster.node"]
    assert (node_type["min_workers"], node_type["max_workers"], prepared["max_workers"]) == (1, 1, 1)
    assert prepared["provider"] == {"type": "local", "head_ip": HEAD, "worker_ips": [WORKER]}


def _broken(tmp_path: Path, change: dict[str, Any]) -> Path:
    broken = {**yaml.safe_load(FILE.read_text()), **change}
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(broken))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head_start_command": ["ray start"]}, "head_start_command"),
        ({"docker": {"image": "x", "container_name": "y", "shm_size": "8g"}}, "shm_size"),
        ({"docker": {"image": "x", "container_name": "y"}}, "ray up"),
        ({"available_node_types": {"spark": {"resources": {}, "node_config": {}}}}, "available_node_types"),
        ({"provider": {"type": "local", "head_ip": HEAD}}, "worker_ips"),
        ({"provider": {"type": "aws"}}, "local"),
        ({"provider": "local"}, "local"),
        ({"provider": {"type": "local", "head_ip": HEAD, "worker_ips": [HEAD]}}, "twice"),
        ({"max_workers": 3}, "max_workers is 3"),
        ({"max_workers": "one"}, "refused by Ray"),
        ({"auth": {}}, "ssh_user"),
        ({"worker_start_ray_commands": ["ray start --address=$RAY_HEAD_IP:6379"]}, "NCCL_IB_HCA"),
    ],
)
def test_a_broken_copy_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_cluster_file(_broken(tmp_path, change))


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_cluster_file(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UsageError, match="list"):
        read_cluster_file(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_cluster_file(tmp_path / "bad.yaml")


@pytest.mark.parametrize("name", NODE_VARIABLES)
def test_each_node_variable_is_missed_when_it_is_gone(config: dict[str, Any], name: str) -> None:
    without = copy.deepcopy(config)
    without["worker_start_ray_commands"] = [
        command.replace(f"{name}=", "OTHER=") for command in without["worker_start_ray_commands"]
    ]
    assert problems(without) == [f"worker_start_ray_commands set no {name}"]


def test_commands_are_head_first_and_carry_the_head_address(config: dict[str, Any]) -> None:
    commands = commands_for(config)
    assert [(c.node_ip, c.role) for c in commands] == [(HEAD, "head")] * 4 + [(WORKER, "worker")] * 4
    assert all(c.command.startswith(f"export RAY_HEAD_IP={HEAD}; ") for c in commands if c.stdin_file is None)
    head_start, worker_start = commands[3].command, commands[7].command
    assert "ray start --head " in head_start
    assert "--autoscaling-config" not in head_start, "ray up alone writes that file"
    assert "--autoscaling-config" in config["head_start_ray_commands"][-1]
    assert "ray start --address=$RAY_HEAD_IP:6379" in worker_start
    for command in (head_start, worker_start):
        words = shlex.split(command)
        assert "--node-ip-address=$VLLM_HOST_IP" in words
        assert "--object-store-memory=8589934592" in words
        assert '--resources={"spark": 1}' in words
    assert commands[1].command == commands[5].command, "both nodes find their own variables the same way"


def _put(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_node_finds_its_own_variables(config: dict[str, Any], tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    _put(tools, "ip", 'echo "4: enp1s0f1np1    inet 192.168.100.11/24 brd 192.168.100.255 scope global enp1s0f1np1"')
    _put(tools, "grep", "printf '/sys/class/infiniband/%s/ports/1/state\\n' rocep1s0f1 roceP2p1s0f1")
    home = tmp_path / "home"
    (home / ".sparkray").mkdir(parents=True)
    (home / ".sparkray" / "local.env").write_text("export TP_SOCKET_IFNAME=mine\n")
    env = {"HOME": str(home), "PATH": f"{tools}:{os.environ['PATH']}"}
    script = commands_for(config)[5].command
    subprocess.run(["bash", "-c", script], env=env, check=True, timeout=30)
    shown = subprocess.run(
        ["bash", "-c", ". ~/.sparkray/node.env && env"], env=env, check=True, timeout=30, capture_output=True, text=True
    ).stdout
    found = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    assert found["VLLM_HOST_IP"] == "192.168.100.11"
    assert found["NCCL_SOCKET_IFNAME"] == found["GLOO_SOCKET_IFNAME"] == found["UCX_NET_DEVICES"] == "enp1s0f1np1"
    assert found["NCCL_IB_HCA"] == "rocep1s0f1,roceP2p1s0f1"
    assert found["TP_SOCKET_IFNAME"] == "mine", "the node's own file is read last"
    assert found["RAY_AUTH_TOKEN_PATH"] == f"{home}/.sparkray/cluster.token"
    assert found["PATH"].startswith(f"{home}/sparkray/.venv/bin:")
    assert stat.S_IMODE((home / ".sparkray" / "node.env").stat().st_mode) == 0o600


def test_a_node_off_the_link_says_so(config: dict[str, Any], tmp_path: Path) -> None:
    _put(tmp_path / "tools", "ip", "true")
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", commands_for(config)[1].command], env=env, timeout=30, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert "no address in 192.168.100.0/24" in done.stderr


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `ssh` that notes user@host and runs the command here, under a HOME of its own a host."""
    script = """
target=${@: -2:1}
echo "$target" >> "$FAKE_SSH_LOG"
export HOME="$FAKE_SSH_HOME/${target#*@}"; mkdir -p "$HOME"
exec bash -c "${@: -1}"
"""
    _put(tmp_path / "ssh-bin", "ssh", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'ssh-bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SSH_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_SSH_HOME", str(tmp_path / "homes"))
    return tmp_path


def _small(start: str, token: Path) -> dict[str, Any]:
    return {
        "provider": {"type": "local", "head_ip": HEAD, "worker_ips": [WORKER]},
        "auth": AUTH,
        "file_mounts": {"~/.sparkray/cluster.token": str(token)},
        "head_start_ray_commands": [f"{start} --head"],
        "worker_start_ray_commands": [f"{start} $RAY_HEAD_IP"],
    }


def test_launch_runs_every_command_on_its_node(fake_ssh: Path) -> None:
    token = fake_ssh / "token"
    token.write_text('it\'s a "token"\n')
    said: list[str] = []
    num_commands = launch(_small('echo >> ~/started "$USER"', token), timeout_seconds=20, report=said.append)
    assert num_commands == 4
    assert (fake_ssh / "log").read_text().split() == [f"nvidia@{HEAD}"] * 2 + [f"nvidia@{WORKER}"] * 2
    for node_ip, word in ((HEAD, "--head"), (WORKER, HEAD)):
        home = fake_ssh / "homes" / node_ip
        assert (home / ".sparkray" / "cluster.token").read_bytes() == token.read_bytes()
        assert stat.S_IMODE((home / ".sparkray" / "cluster.token").stat().st_mode) == 0o600
        assert (home / "started").read_text().split()[-1] == word
    assert said[0] == f"head {HEAD}: file ~/.sparkray/cluster.token"


def test_a_head_that_fails_stops_the_launch(fake_ssh: Path) -> None:
    token = fake_ssh / "token"
    token.write_text("t")
    with pytest.raises(LaunchError, match=rf"head {HEAD}.*code 7: no such GPU"):
        launch(_small("echo no such GPU >&2; exit 7; :", token), timeout_seconds=20, report=lambda line: None)
    assert f"nvidia@{WORKER}" not in (fake_ssh / "log").read_text()


def test_a_slow_node_and_a_dead_node_are_told_apart(fake_ssh: Path) -> None:
    with pytest.raises(WaitTimeoutError, match=f"worker {WORKER}"):
        run_on_node(NodeCommand(WORKER, "worker", "start", "sleep 60"), AUTH, timeout_seconds=0.5)
    with pytest.raises(UnavailableError, match="could not reach"):
        run_on_node(NodeCommand(WORKER, "worker", "start", "exit 255"), AUTH, timeout_seconds=20)
    with pytest.raises(UnavailableError, match="cannot be read"):
        run_on_node(NodeCommand(WORKER, "worker", "file", "cat", fake_ssh / "none"), AUTH, timeout_seconds=20)


GOOD_PROBE = {
    "interface": "enp1s0f1np1",
    "mtu": "9000",
    "active_hcas": "2",
    "available_kib": str(100 * 2**20),
    "num_gpus": "1",
    "ray": "2.60.0",
    "token": "abc",
}


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({"interface": ""}, "problem", "no interface"),
        ({"mtu": "1500"}, "warning", "MTU 1500"),
        ({"active_hcas": "1"}, "warning", "1 RDMA"),
        ({"num_gpus": "0"}, "problem", "0 GPUs"),
        ({"available_kib": str(3 * 2**20)}, "warning", "3 GiB"),
        ({"ray": ""}, "problem", "ray is not there"),
        ({"token": ""}, "warning", "no token"),
    ],
)
def test_the_probe_is_judged(change: dict[str, str], level: str, said: str) -> None:
    assert {finding.level for finding in judge_node(HEAD, GOOD_PROBE)} == {"ok"}
    (bad,) = [finding for finding in judge_node(HEAD, {**GOOD_PROBE, **change}) if finding.level != "ok"]
    assert (bad.level, bad.node_ip) == (level, HEAD)
    assert said in bad.found
    assert bad.mend


def test_nodes_that_differ_are_found() -> None:
    assert judge_together({HEAD: GOOD_PROBE, WORKER: GOOD_PROBE}) == []
    (finding,) = judge_together({HEAD: GOOD_PROBE, WORKER: {**GOOD_PROBE, "ray": "2.59.0"}})
    assert finding.level == "problem"
    assert "2.59.0" in finding.found


def test_the_probe_runs_here() -> None:
    done = subprocess.run(
        ["bash", "-c", f"NODE_IP=127.0.0.1\n{PROBE}"], capture_output=True, text=True, timeout=60, check=True
    )
    probe = parse_probe("Welcome to a login shell\n" + done.stdout)
    assert set(probe) == set(GOOD_PROBE)
    assert int(probe["available_kib"]) > 0
