"""The wait for rows, when the word that no more will come overtakes the rows that were sent before it."""

from __future__ import annotations

import threading
import time

import pytest

from sparkray.config.handoff import WireLimits
from sparkray.handoff import transfer as module
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.messages import Confirm, Generate
from sparkray.handoff.transfer import Transfer
from tests.unit.handoff_toy import hello_for

REQUEST = Generate("r", "ticket", (5, 17, 3, 88), max_tokens=2)
NO_TOKEN = Confirm("r", (), ())


def test_rows_that_were_overtaken_are_still_awaited() -> None:
    transfer = Transfer(REQUEST, 0, lambda rows: None)
    transfer.put_confirm(NO_TOKEN)
    waiting = threading.Thread(target=transfer.wait_for_rows, args=(30.0, lambda seconds: None))
    waiting.start()
    try:
        time.sleep(0.2)
        assert not transfer.is_closed
        transfer.begin(hello_for(REQUEST, 0), WireLimits())
        time.sleep(0.1)
        assert not transfer.is_closed
    finally:
        transfer.note_break(Reason.CANCELLED)
        waiting.join(10)
    # It had connected and is gone: nothing more is waited for.
    assert transfer.is_closed and transfer.last_reason == Reason.PREFILL_LOST


def test_a_sender_that_ended_before_it_connected_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ARRIVAL_SECONDS", 0.05)
    transfer = Transfer(REQUEST, 0, lambda rows: None)
    transfer.put_confirm(NO_TOKEN)
    assert not transfer.wait_for_rows(30.0, lambda seconds: None)
    assert transfer.last_reason == Reason.PREFILL_LOST
    with pytest.raises(ProtocolError, match="not awaited any more"):
        transfer.begin(hello_for(REQUEST, 0), WireLimits())
