"""A commitment to the states between blocks, and the spot check of one block.

The prover publishes the root of a Merkle tree over its states: the normed input, the state after each block, the
logits. A verifier names a block only then; the prover sends the state before it and two paths, and the verifier
runs that one block. The first state a verifier makes itself, from the nonce.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from sparkray.config.poc import ModelParams
from sparkray.errors import InputError
from sparkray.poc.hardened.draws import draw_hardened_input
from sparkray.poc.hardened.integers import normalise
from sparkray.poc.hardened.model import HardenedTransformer


def leaf(index: int, state: bytes) -> bytes:
    """Hash of one state; its index is part of it, so states cannot change places."""
    return hashlib.sha256(b"sparkray-poc-leaf" + index.to_bytes(4, "little") + state).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"sparkray-poc-node" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Commitment:
    """A Merkle tree over the leaves of one nonce."""

    leaves: tuple[bytes, ...]

    @property
    def root(self) -> bytes:
        return self._levels()[-1][0]

    def path(self, index: int) -> tuple[bytes, ...]:
        """The siblings from leaf `index` to the root."""
        siblings = []
        for level in self._levels()[:-1]:
            siblings.append(level[index ^ 1] if index ^ 1 < len(level) else level[index])
            index //= 2
        return tuple(siblings)

    def _levels(self) -> list[list[bytes]]:
        levels = [list(self.leaves)]
        while len(levels[-1]) > 1:
            level = levels[-1]
            # An odd one out is paired with itself; the leaf count is fixed by the model, so this hides nothing.
            pairs = [(level[at], level[min(at + 1, len(level) - 1)]) for at in range(0, len(level), 2)]
            levels.append([_node(left, right) for left, right in pairs])
        return levels


def path_leads_to(root: bytes, index: int, value: bytes, path: tuple[bytes, ...]) -> bool:
    """Whether `value` is leaf `index` of the tree with that root."""
    for sibling in path:
        value = _node(sibling, value) if index % 2 else _node(value, sibling)
        index //= 2
    return value == root


@dataclass(frozen=True, slots=True)
class Opening:
    """What the prover sends when block `layer` is asked for.

    Attributes:
        state: bytes of the state before the block, (seq_len, dim) int8.
        path_before: path of that state.
        leaf_after: hash of the state after the block.
        path_after: path of that one.
    """

    layer: int
    state: bytes
    path_before: tuple[bytes, ...]
    leaf_after: bytes
    path_after: tuple[bytes, ...]

    @classmethod
    def of(cls, commitment: Commitment, states: list[bytes], layer: int) -> Opening:
        after = layer + 1
        return cls(layer, states[layer], commitment.path(layer), commitment.leaves[after], commitment.path(after))


def challenge_layer(root: bytes, secret: bytes, num_layers: int) -> int:
    """The block that a verifier asks for: from its own secret, which it shows after the root was published."""
    digest = hashlib.sha256(b"sparkray-poc-challenge" + secret + root).digest()
    return int.from_bytes(digest, "little") % num_layers


def spot_check(
    root: bytes, opening: Opening, block_hash: str, public_key: str, nonce: int, params: ModelParams
) -> bool:
    """Run the one block that was opened and compare.

    Raises:
        InputError: a state that has not the model's size, or a block that it does not have.
    """
    if not 0 <= opening.layer < params.n_layers:
        raise InputError(f"block {opening.layer} was opened, and 0 to {params.n_layers - 1} exist.", param="layer")
    if len(opening.state) != params.seq_len * params.dim:
        raise InputError(
            f"a state of {len(opening.state)} bytes was opened, and {params.seq_len * params.dim} are expected.",
            param="state",
        )
    before, after = opening.layer, opening.layer + 1
    if not path_leads_to(root, before, leaf(before, opening.state), opening.path_before):
        return False
    if not path_leads_to(root, after, opening.leaf_after, opening.path_after):
        return False
    state = np.frombuffer(opening.state, dtype=np.int8).reshape(1, params.seq_len, params.dim)
    if before == 0:
        drawn = draw_hardened_input(block_hash, public_key, nonce, params)
        if normalise(torch.from_numpy(drawn)).numpy().tobytes() != opening.state:
            return False
    model = HardenedTransformer(block_hash, params, torch.device("cpu"), layers=[opening.layer])
    computed = model.block(torch.from_numpy(state.copy()), opening.layer, last_only=after == params.n_layers)
    return leaf(after, computed.numpy().tobytes()) == opening.leaf_after
