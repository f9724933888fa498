"""Bodies of `/api/v1/pow/*`, with the network's field names."""

from __future__ import annotations

from typing import Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sparkray.config.poc import ModelParams, WeightsConfig
from sparkray.errors import InputError
from sparkray.poc.fleet.messages import Run
from sparkray.poc.proofs import ProofBatch

UNSET = -1


class InitRequest(BaseModel):
    """What a node shall compute.

    `batch_size` is required and not used, as on the network: each group measures its own.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    node_id: int = Field(UNSET, ge=UNSET)
    node_count: int = Field(UNSET, ge=UNSET)
    block_hash: str
    block_height: int
    public_key: str
    batch_size: int
    r_target: float = Field(gt=0)
    fraud_threshold: float = Field(gt=0, le=1)
    params: ModelParams = ModelParams()
    url: str

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an address that begins with http:// or https:// is expected")
        return url.rstrip("/")

    def run(self, weights: WeightsConfig) -> Run:
        """The run that this asks for.

        Raises:
            InputError: node_id is not below node_count, where both are given.
        """
        if self.node_count != UNSET and not self.node_id < self.node_count:
            raise InputError(
                f"node_id={self.node_id} was given, and {self._accepted_ids} is accepted with"
                f" node_count={self.node_count}.",
                param="node_id",
            )
        return Run(
            block_hash=self.block_hash,
            block_height=self.block_height,
            public_key=self.public_key,
            r_target=self.r_target,
            fraud_threshold=self.fraud_threshold,
            params=self.params,
            weights=weights,
            node_id=self.node_id,
            node_count=self.node_count,
            url=self.url,
        )

    @property
    def _accepted_ids(self) -> str:
        return f"0 to {self.node_count - 1}" if self.node_count > 0 else "no node_id"


class ProofBody(BaseModel):
    """A received proof batch. Distances may be anything: what is wrong with one is said of that one.

    `node_count` is not the network's: with it nonces of another node's class are refused.
    """

    model_config = ConfigDict(frozen=True)

    public_key: str
    block_hash: str
    block_height: int
    nonces: list[int]
    dist: list[float]
    node_id: int
    node_count: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if len(self.nonces) != len(self.dist):
            raise ValueError(f"{len(self.nonces)} nonces and {len(self.dist)} distances were given, not pairs")
        return self

    def batch(self) -> ProofBatch:
        """As the core has it."""
        return ProofBatch(
            self.public_key, self.block_hash, self.block_height, tuple(self.nonces), tuple(self.dist), self.node_id
        )
