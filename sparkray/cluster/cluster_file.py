"""Reading a `cluster.yaml`: by Ray's own rules, then by those that two machines on one cable add.

Ray's rules (`prepare_config`, `validate_config`) catch an unknown key and what the local provider refuses. They do
not look into the start commands, where the mistakes that cost an evening are: an address on the office network, a
worker count that leaves a machine out, half of the cable's two RDMA devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sparkray.errors import NotFoundError, UsageError

# A node without one of these takes the wrong network, half the bandwidth, or asks for no token.
NODE_VARIABLES = (
    "VLLM_HOST_IP",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "TP_SOCKET_IFNAME",
    "UCX_NET_DEVICES",
    "NCCL_IB_HCA",
    "NCCL_IB_MERGE_NICS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_memory_monitor_refresh_ms",
)
START_FLAGS = ("--node-ip-address", "--object-store-memory")


def read_cluster_file(path: Path) -> dict[str, Any]:
    """The file's content, unchanged, once Ray and `problems` accept it.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is no YAML, or Ray or this house refuses it; the message says what and where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as failure:
        raise NotFoundError(f"cluster file {path} does not exist.") from failure
    except OSError as failure:
        raise UsageError(f"cluster file {path} cannot be read: {failure.strerror}.") from failure
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as failure:
        raise UsageError(f"cluster file {path} is not valid YAML: {failure}.") from failure
    if not isinstance(config, dict):
        raise UsageError(f"cluster file {path} holds a {type(config).__name__}, and a table of keys is expected.")
    check_by_ray(config, path)
    if found := problems(config):
        raise UsageError(f"cluster file {path} would not start as it should: {'; '.join(found)}.")
    return config


def check_by_ray(config: Mapping[str, Any], path: Path) -> None:
    """Ray's own `prepare_config` and `validate_config`, with their findings as one UsageError."""
    import click
    import jsonschema  # type: ignore[import-untyped]
    from ray.autoscaler._private.util import prepare_config, validate_config

    if not isinstance(config.get("provider"), dict) or config["provider"].get("type") != "local":
        raise UsageError(
            f"cluster file {path} has no provider of type `local`.",
            hint="Give `provider` the keys type: local, head_ip and worker_ips.",
        )
    try:
        validate_config(prepare_config(dict(config)))
    except jsonschema.ValidationError as finding:
        where = ".".join(str(part) for part in finding.absolute_path) or "the top level"
        raise UsageError(f"cluster file {path} is refused by Ray at {where}: {finding.message}.") from finding
    except click.ClickException as finding:
        raise UsageError(f"cluster file {path} is refused by Ray: {finding.message}") from finding
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as finding:
        # `prepare_config` reads the values before any schema has checked their types.
        raise UsageError(f"cluster file {path} is refused by Ray: {type(finding).__name__}: {finding}.") from finding


def problems(config: Mapping[str, Any]) -> list[str]:
    """What Ray accepts and these machines do not, each as half a sentence; empty when all is well."""
    worker_ips = config["provider"]["worker_ips"]
    found = [
        f"{key} is {config[key]} and provider.worker_ips names {len(worker_ips)}"
        for key in ("min_workers", "max_workers")
        if config.get(key, len(worker_ips)) != len(worker_ips)
    ]
    if len({config["provider"]["head_ip"], *worker_ips}) != len(worker_ips) + 1:
        found.append("an address stands twice under provider")
    if not config.get("auth", {}).get("ssh_user"):
        found.append("auth.ssh_user is not set")
    if config.get("docker"):
        found.append("a docker section is for `ray up` alone: docs/operations.md shows the way with containers")
    for role in ("head", "worker"):
        commands = "\n".join(config.get(f"{role}_start_ray_commands", []))
        found += [f"{role}_start_ray_commands set no {name}" for name in NODE_VARIABLES if f"{name}=" not in commands]
        found += [f"{role}_start_ray_commands give no {flag}" for flag in START_FLAGS if flag not in commands]
    if "$RAY_HEAD_IP" not in "\n".join(config.get("worker_start_ray_commands", [])):
        found.append("worker_start_ray_commands do not join $RAY_HEAD_IP")
    return found
