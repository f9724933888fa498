"""What the client of an answer says while it is written, heard on the thread that writes."""

from __future__ import annotations

from sparkray.errors import WaitTimeoutError
from sparkray.handoff.errors import ProtocolError, Reason
from sparkray.handoff.messages import Abort, Confirm, Tokens, decode_message
from sparkray.handoff.tcp import Connection
from sparkray.handoff.transfer import Transfer


class ClientEar:
    """Hears and answers one client.

    Args:
        connection: on which GENERATE came.
        transfer: of its rows; None where it has none.
    """

    def __init__(self, connection: Connection, transfer: Transfer | None) -> None:
        self._connection = connection
        self._transfer = transfer

    def listen(self, timeout_seconds: float) -> None:
        """Take what has come, waiting so long for the first.

        Raises:
            ProtocolError: the client is gone, cancels, or says what does not belong here.
        """
        while self._connection.is_readable(timeout_seconds):
            timeout_seconds = 0.0
            try:
                message = decode_message(self._connection.receive())
            except (EOFError, OSError, WaitTimeoutError) as failure:
                raise ProtocolError(Reason.CANCELLED, "the client went away.") from failure
            if isinstance(message, Abort):
                raise ProtocolError(Reason.CANCELLED, f"the client cancelled: {message.message}")
            if not isinstance(message, Confirm) or self._transfer is None:
                raise ProtocolError(Reason.ORDER, f"{type(message).__name__} came while the answer was written.")
            self._transfer.put_confirm(message)

    def send(self, tokens: Tokens) -> None:
        """Give tokens out, after a look at what the client says.

        Raises:
            ProtocolError, OSError: it is gone.
        """
        self.listen(0.0)
        self._connection.send(tokens)
