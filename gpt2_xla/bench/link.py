"""The line between the benchmark and a loop's process: JSON objects, one a line, over a socket file."""

import json
import socket
from pathlib import Path
from typing import Any


class Link:
    """One end. Whoever waits for the other sleeps, and so takes nothing from the loop whose turn it is."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rwb")

    @classmethod
    def connect(cls, path: Path) -> "Link":
        """The loop's end."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        return cls(connection)

    def send(self, **facts: Any) -> None:
        """Send one object. Raises OSError if the other end is gone."""
        self._file.write(json.dumps(facts).encode() + b"\n")
        self._file.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for one object; raises EOFError if the other end is gone."""
        line = self._file.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._connection.close()
