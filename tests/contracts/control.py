"""A hook of the target file: asks the process that keeps the servers (`verified.py`) for what it names.

    python control.py SOCKET HOOK INSTANCE

It is over when that is done. It needs nothing of the project, as it is started anew for each hook.
"""

from __future__ import annotations

import socket
import sys


def main() -> None:
    """Ask, and wait for the answer: one line, `done` or what went wrong."""
    path, *words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as keeper:
        keeper.connect(path)
        keeper.sendall(f"{' '.join(words)}\n".encode())
        answer = keeper.makefile().readline().strip()
    if answer != "done":
        sys.exit(answer or "the process that keeps the servers has ended")


if __name__ == "__main__":
    main()
