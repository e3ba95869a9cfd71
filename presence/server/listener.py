"""The listening socket: it leaves open files to the stores, and turns of the loop to those who are here.

Clients that have not upgraded count in no limit of ours. Without this they could take the last open file: then no store
can be asked again, and asyncio logs a traceback for each place in the backlog, thousands a second (Python 3.11). And it
would accept all who wait at one go, and begin with all of them in one turn of the loop: in a storm that is seconds.
"""

from __future__ import annotations

import logging
import resource
import socket
import time

from hypercorn.config import Config, Sockets

BACKLOG = 4096  # connections the kernel may hold before they are accepted
SPARE_FILES = 256  # that no client gets; a quarter where there are few
LOG_SECONDS = 60.0

log = logging.getLogger(__name__)


class Listener(socket.socket):
    """Refuses connections when the process has few open files left."""

    _logged_at = -LOG_SECONDS

    def listen(self, backlog: int = BACKLOG, /) -> None:
        """Listen; asyncio's ``backlog`` is `ListenerConfig.backlog`, and means how many it accepts in a turn, too."""
        super().listen(max(backlog, BACKLOG))

    def accept(self) -> tuple[socket.socket, object]:
        """Return a connection.

        Raises:
            ConnectionAbortedError: there was no room for it, so it was closed. asyncio takes that for the client's end.
        """
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        connection, address = super().accept()
        if connection.fileno() < files - min(SPARE_FILES, files // 4):  # numbers are given out from below
            return connection, address
        connection.close()
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._logged_at = time.monotonic()
            log.warning("connections are refused: %d open files are too few", files)
        raise ConnectionAbortedError


class ListenerConfig(Config):
    """Hypercorn's settings, under which it listens with a `Listener`."""

    backlog = 10  # connections accepted in a turn of the loop; one at a time would cost a fifth more for each

    def create_sockets(self) -> Sockets:
        """Return the sockets to listen on."""
        plain = super().create_sockets().insecure_sockets
        return Sockets([], [Listener(fileno=sock.detach()) for sock in plain], [])
