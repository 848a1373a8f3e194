"""The agent as a program of its own: `python -I -S FOLDER_OR_ZIP SOCKET`.

SOCKET is the number of an inherited descriptor of a connected socket, the path of a unix socket to listen on, or "to:"
and the path of one to connect to. The first frame on a connection has the settings; those of a second are not heeded.
"""

import contextlib
import os
import signal
import socket
import sys
import types
from importlib import import_module

_TO = "to:"
_FIRST_CONNECTION_S = 120.0
"""Whoever started it connects within that time, or has gone."""


def main(where: str) -> None:
    frames, settings_module = import_module("inside.frames"), import_module("inside.settings")
    confine = import_module("inside.confine")
    confine.forbid_inspection()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's handler would end it, also as PID 1
    listener = None
    if where.isdigit():
        connection = socket.socket(fileno=int(where))
        connection.set_inheritable(False)
    elif where.startswith(_TO):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(where[len(_TO) :])
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(where)
        listener = socket.socket(socket.AF_UNIX)
        listener.settimeout(_FIRST_CONNECTION_S)
        listener.bind(where)
        os.chmod(where, 0o666)  # who gets here is a matter of the folder it is in
        listener.listen(8)
        connection, _ = listener.accept()
        connection.settimeout(None)
    settings = settings_module.Settings.from_json(frames.first_settings(connection))
    if settings.confinement or (settings.is_init and os.getpid() != 1):
        import_module("inside.work").preload()
        if os.getpid() != 1:
            confine.adopt_orphans()
        if settings.confinement:
            confine.confine(settings.confinement)
    import_module("inside.agent").serve(connection, settings, listener)


if __name__ == "__main__":
    # The folder becomes a package and leaves the path, where its modules would stand before the library's.
    package = types.ModuleType("inside")
    package.__path__ = [sys.path.pop(0)]
    sys.modules["inside"] = package
    main(sys.argv[1])
