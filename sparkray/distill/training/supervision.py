"""Where the teacher's rows of a training sequence come from: a store, a client that asks ahead, or nowhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from sparkray.distill.client.client import ScoredSequence, TeacherClient
from sparkray.distill.scores import TokenScores


class Supervision(Protocol):
    """Rows by the number of a training sequence."""

    def rows(self, sequences: Sequence[int], upcoming: Sequence[int]) -> list[TokenScores] | None:
        """Rows of some sequences, or None where only the data teaches.

        Args:
            sequences: that are needed now.
            upcoming: that will be needed next, in their order.
        """


class DataOnly:
    """No teacher: cross entropy on the data."""

    def rows(self, sequences: Sequence[int], upcoming: Sequence[int]) -> list[TokenScores] | None:
        return None


class FromStore:
    """Rows of a finished store.

    Args:
        read: gives the rows of a sequence, as `LogitStore` does by index.
    """

    def __init__(self, read: Callable[[int], TokenScores]) -> None:
        self._read = read

    def rows(self, sequences: Sequence[int], upcoming: Sequence[int]) -> list[TokenScores] | None:
        return [self._read(sequence) for sequence in sequences]


class FromClient:
    """Rows of a teacher that answers while the student computes; at most `prefetch_depth` sequences ahead.

    Args:
        client: asks.
        tokens: of a training sequence by its number.
    """

    def __init__(self, client: TeacherClient, tokens: Callable[[int], list[int]]) -> None:
        self._client = client
        self._tokens = tokens
        self._asked: OrderedDict[int, Future[ScoredSequence]] = OrderedDict()

    def rows(self, sequences: Sequence[int], upcoming: Sequence[int]) -> list[TokenScores] | None:
        due = [self._ask(sequence) for sequence in sequences]
        for sequence in list(upcoming)[: self._client.config.prefetch_depth]:
            self._asked[sequence] = self._ask(sequence)
        for sequence in sequences:
            self._asked.pop(sequence, None)
        return [future.result().scores for future in due]

    def _ask(self, sequence: int) -> Future[ScoredSequence]:
        return self._asked.get(sequence) or self._client.submit(self._tokens(sequence))
