"""Settings of the Ray cluster that sparkray starts or joins."""

from __future__ import annotations

from pydantic import Field

from sparkray.config.base import Settings

LISTEN_ON_NODE_ADDRESS = "sparkray.cluster.replica_address.listen_on_node_address"
"""The set-up hook of every Serve replica's process, by name: deployments of all packages give it to Ray."""


class ClusterConfig(Settings):
    """A local cluster (address None), or one to join."""

    address: str | None = Field(None, description="`host:port` of a running cluster; None starts one on this machine.")
    node_ip: str = Field("127.0.0.1", description="Address of this node; workers on other machines need a real one.")
    port: int = Field(0, ge=0, le=65535, description="Port of the head's control store; 0 takes a free one.")
    num_cpus: int | None = Field(8, ge=1, description="Logical CPUs; more than cores, or small machines block.")
    num_gpus: int | None = Field(None, ge=0)
    object_store_gib: float = Field(0.5, gt=0.08, description="Shared with the model on unified memory: kept small.")
    dashboard: bool = True
    dashboard_port: int = Field(8265, ge=1, le=65535)
    start_timeout_seconds: float = Field(180.0, gt=0)
