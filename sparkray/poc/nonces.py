"""Which nonces belong to whom.

A node owns the residue class `node_id` modulo `num_nodes`; its GPU groups share that class. Classes are disjoint
and complete even where nodes have different numbers of groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sparkray.errors import InputError


@dataclass(slots=True)
class NonceIterator(Iterator[int]):
    """The nonces of one GPU group, endless: `node_id + group_id*num_nodes + x*num_groups*num_nodes`.

    Attributes:
        cursor: how many were given; start from a stored cursor to go on where a lost worker was.
    """

    node_id: int = 0
    num_nodes: int = 1
    group_id: int = 0
    num_groups: int = 1
    cursor: int = field(default=0)

    def __post_init__(self) -> None:
        for name, index, count in (
            ("node_id", self.node_id, self.num_nodes),
            ("group_id", self.group_id, self.num_groups),
        ):
            if not 0 <= index < count:
                raise InputError(f"{name}={index} was given, and 0 to {count - 1} is accepted.", param=name)
        if self.cursor < 0:
            raise InputError(f"cursor={self.cursor} was given, and a count of 0 or more is accepted.", param="cursor")

    def __next__(self) -> int:
        nonce = self.peek(self.cursor)
        self.cursor += 1
        return nonce

    def peek(self, index: int) -> int:
        """The nonce at `index`, without moving."""
        return self.node_id + self.group_id * self.num_nodes + index * self.num_groups * self.num_nodes

    def take(self, count: int) -> tuple[int, ...]:
        """The next `count` nonces."""
        return tuple(next(self) for _ in range(count))
