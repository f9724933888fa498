"""Starting the nodes of a `cluster.yaml` by hand: the same commands as `ray up`, one node after the other.

`ray up` with the local provider is known to start the head and leave the workers untouched without an error
(ray issues 20711, 46204). This launcher reads the same file, runs the same commands through ssh with a time limit
on each, and stops with the node's own words when one fails. What it runs is decided by `commands_for`, a pure
function of the file.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparkray.errors import SparkrayError, UnavailableError, WaitTimeoutError

Role = Literal["head", "worker"]

# Written by `ray up` alone; a head that is told of a file which is not there loses its autoscaler.
_AUTOSCALING_FLAG = re.compile(r"\s--autoscaling-config[= ]\S+")


class LaunchError(SparkrayError):
    """A node refused one of its commands."""


@dataclass(frozen=True, slots=True)
class NodeCommand:
    """One command of one node.

    Attributes:
        node_ip: the address that ssh goes to.
        role: "head" or "worker".
        purpose: what the command is for, in the words of the file's own keys.
        command: for bash on the node.
        stdin_file: a local file that the command reads, or None.
    """

    node_ip: str
    role: Role
    purpose: str
    command: str
    stdin_file: Path | None = None

    def ssh(self, auth: Mapping[str, Any]) -> list[str]:
        """The command as an argument list for ssh, which never asks and gives up on a dead link.

        Args:
            auth: the file's `auth` section: `ssh_user`, and `ssh_private_key` where it is not the usual one.
        """
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"]
        if "ssh_private_key" in auth:
            options += ["-i", str(Path(auth["ssh_private_key"]).expanduser())]
        return ["ssh", *options, f"{auth['ssh_user']}@{self.node_ip}", f"bash -c {shlex.quote(self.command)}"]


def nodes_of(config: Mapping[str, Any]) -> list[tuple[str, Role]]:
    """Every node's address with its role, the head first."""
    provider = config["provider"]
    return [(provider["head_ip"], "head"), *((node_ip, "worker") for node_ip in provider["worker_ips"])]


def commands_for(config: Mapping[str, Any]) -> list[NodeCommand]:
    """What each node of a cluster file has to run, in order: files, set-up, start; the head before the workers.

    Args:
        config: the file's content, as `read_cluster_file` returns it.
    """
    head_ip = config["provider"]["head_ip"]
    commands = []
    for node_ip, role in nodes_of(config):
        for remote, local in config.get("file_mounts", {}).items():
            commands.append(NodeCommand(node_ip, role, f"file {remote}", _receive(remote), Path(local).expanduser()))
        for key in (
            "initialization_commands",
            "setup_commands",
            f"{role}_setup_commands",
            f"{role}_start_ray_commands",
        ):
            for command in config.get(key, []):
                text = f"export RAY_HEAD_IP={head_ip}; {_AUTOSCALING_FLAG.sub('', command)}"
                commands.append(NodeCommand(node_ip, role, key, text))
    return commands


def _receive(remote: str) -> str:
    """A command that writes stdin to `remote`, readable by its owner alone, under a temporary name first."""
    path = f'"$HOME"/{shlex.quote(remote[2:])}' if remote.startswith("~/") else shlex.quote(remote)
    return f'umask 077 && mkdir -p "$(dirname {path})" && cat > {path}.partial && mv {path}.partial {path}'


def launch(config: Mapping[str, Any], *, timeout_seconds: float, report: Callable[[str], None]) -> int:
    """Run every command of `commands_for(config)` through ssh; returns how many ran.

    Args:
        config: the file's content, as `read_cluster_file` returns it.
        timeout_seconds: limit of each single command.
        report: is called with one line before each command.

    Raises:
        LaunchError: a command ended with another code than 0; its last lines are in the message.
        UnavailableError: ssh itself could not reach the node, or is not installed.
        WaitTimeoutError: a command took longer than the limit, and was ended here.
    """
    commands = commands_for(config)
    for command in commands:
        report(f"{command.role} {command.node_ip}: {command.purpose}")
        run_on_node(command, config["auth"], timeout_seconds=timeout_seconds)
    return len(commands)


def run_on_node(command: NodeCommand, auth: Mapping[str, Any], *, timeout_seconds: float) -> str:
    """Run one command through ssh and return what it wrote to stdout; raises as `launch` does."""
    arguments = command.ssh(auth)
    where = f"{command.role} {command.node_ip}, {command.purpose}"
    try:
        stdin = command.stdin_file.read_bytes() if command.stdin_file else b""
    except OSError as failure:
        raise UnavailableError(
            f"{where}: the local file {command.stdin_file} cannot be read: {failure.strerror}.",
            hint="cluster.yaml says above `file_mounts` how to make the token file.",
        ) from failure
    try:
        process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except FileNotFoundError as failure:
        raise UnavailableError("ssh is not installed on this machine.", hint="Install an OpenSSH client.") from failure
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout_seconds)
    except subprocess.TimeoutExpired as slow:
        raise WaitTimeoutError(
            f"{where}: not done within {timeout_seconds:g} s.",
            hint="The command may still run on the node. See `ray status` there, or give --timeout more seconds.",
        ) from slow
    finally:
        _end_group(process)
    if process.returncode != 0:
        words = _last_lines(stdout + b"\n" + stderr)
        if process.returncode == 255:
            raise UnavailableError(
                f"{where}: ssh could not reach the node: {words}",
                hint=f"Try `ssh -o BatchMode=yes {auth['ssh_user']}@{command.node_ip} true` until it asks nothing.",
            )
        raise LaunchError(f"{where}: the command ended with code {process.returncode}: {words}")
    return stdout.decode(errors="replace")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End ssh and what it started here (a proxy command, a helper), on every way out, Ctrl-C included."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)


def _last_lines(output: bytes, num_lines: int = 6) -> str:
    lines: Sequence[str] = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-num_lines:]) or "it said nothing"
