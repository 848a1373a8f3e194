"""Whether a node has the run folder."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

from upspiral.errors import ConfigError

_NAME = ".shared"


@dataclass(frozen=True, slots=True)
class Mark:
    """Something in the run folder that nobody could have put into another folder of the same name."""

    folder: Path
    text: str

    @classmethod
    def made(cls, folder: Path) -> Mark:
        made = cls(folder.resolve(), secrets.token_hex(16))
        (made.folder / _NAME).write_text(made.text)
        return made

    def check(self) -> None:
        """Raises ConfigError where the folder is another one. The parts of a checkpoint would be written there, into as
        many folders as there are nodes, and nobody could read them together."""
        path = self.folder / _NAME
        if not path.exists() or path.read_text() != self.text:
            raise ConfigError(
                f"{socket.gethostname()} does not have the run folder {self.folder}: put it where all nodes see it "
                "under the same path, such as a network file system (--run)"
            )
