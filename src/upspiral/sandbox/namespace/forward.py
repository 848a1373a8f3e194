"""Runs inside a sandbox, by itself and with nothing but the standard library.

    python forward.py PORT=SOCKET [PORT=SOCKET ...] -- PROGRAM [ARGUMENT ...]

Listens on loopback ports, connects each caller to the unix socket of that port, and runs the program meanwhile. Its
exit status is the program's. This is how an agent inside reaches the gateway although there is no network.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading

_CHUNK_BYTES = 64 * 1024


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Copies until the source ends, and then says so to the sink."""
    with contextlib.suppress(OSError):
        while chunk := source.recv(_CHUNK_BYTES):
            sink.sendall(chunk)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _connect(caller: socket.socket, path: str) -> None:
    with caller, socket.socket(socket.AF_UNIX) as target:
        try:
            target.connect(path)
        except OSError:
            return  # the caller sees a closed connection
        back = threading.Thread(target=_pump, args=(target, caller), daemon=True)
        back.start()
        _pump(caller, target)
        back.join()


def _serve(listener: socket.socket, path: str) -> None:
    while True:
        caller, _ = listener.accept()
        threading.Thread(target=_connect, args=(caller, path), daemon=True).start()


def main(arguments: list[str]) -> int:
    """Listens before the program starts, so that its first connection succeeds."""
    end = arguments.index("--")
    for rule in arguments[:end]:
        port, _, path = rule.partition("=")
        listener = socket.create_server(("127.0.0.1", int(port)), backlog=128)
        threading.Thread(target=_serve, args=(listener, path), daemon=True).start()
    return_code = subprocess.call(arguments[end + 1 :])
    return return_code if return_code >= 0 else 128 - return_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
