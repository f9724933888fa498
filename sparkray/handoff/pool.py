"""The decode side's sequences: one a running request, and those of conversations, kept until their place is needed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from sparkray.handoff.engine import DecodeEngine, DecodeSequence
from sparkray.handoff.errors import ProtocolError, Reason


@dataclass(slots=True)
class HeldSequence:
    """A sequence and the tokens whose rows it holds.

    Attributes:
        sequence: in the engine.
        token_ids: token of each row; as long as the sequence has rows.
        conversation: name under which it is kept; empty: it is not.
    """

    sequence: DecodeSequence
    token_ids: list[int] = field(default_factory=list)
    conversation: str = ""


class SequencePool:
    """At most `capacity` sequences; an idle conversation gives way to a new request, the oldest first.

    Methods that touch the engine are called on its thread.
    """

    def __init__(self, engine: DecodeEngine, capacity: int) -> None:
        self._engine = engine
        self._capacity = capacity
        self._idle: OrderedDict[str, HeldSequence] = OrderedDict()
        self._num_busy = 0
        self._lock = Lock()

    @property
    def num_busy(self) -> int:
        return self._num_busy

    def acquire(self, conversation: str, prompt: Sequence[int]) -> HeldSequence:
        """A sequence that holds rows of a prefix of the prompt, at most all tokens but the last.

        Raises:
            ProtocolError: all places are busy.
        """
        with self._lock:
            held = self._idle.pop(conversation, None) if conversation else None
            if held is None:
                while self._idle and len(self._idle) + self._num_busy >= self._capacity:
                    self._idle.popitem(last=False)[1].sequence.close()
                if self._num_busy >= self._capacity:
                    raise ProtocolError(
                        Reason.BUSY, f"all {self._capacity} sequences are in use; try again, or raise max_sequences."
                    )
                held = HeldSequence(self._engine.open_sequence(), conversation=conversation)
            self._num_busy += 1
        keep = common_prefix(held.token_ids, prompt[:-1])
        if keep < len(held.token_ids):
            held.sequence.truncate(keep)
            del held.token_ids[keep:]
        return held

    def release(self, held: HeldSequence, *, keep: bool) -> None:
        """Give a sequence back; kept under its conversation's name where it has one."""
        with self._lock:
            self._num_busy -= 1
            older = self._idle.pop(held.conversation, None)
            if keep and held.conversation:
                self._idle[held.conversation] = held
            else:
                held.sequence.close()
        if older is not None:
            older.sequence.close()

    def forget(self, conversation: str) -> None:
        """Let an idle conversation go."""
        with self._lock:
            held = self._idle.pop(conversation, None)
        if held is not None:
            held.sequence.close()


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    shorter = min(len(one), len(other))
    for index in range(shorter):
        if one[index] != other[index]:
            return index
    return shorter
