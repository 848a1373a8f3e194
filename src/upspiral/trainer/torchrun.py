"""Ranks that torchrun starts, on this machine or others: the run says how, listens, and waits until all have come."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

from upspiral.errors import ConfigError, DeadlineError
from upspiral.trainer.rank import ADDRESS, KEY
from upspiral.trainer.rank_processes import ProcessRank

CONNECT_DEADLINE_S = 1800.0
"""For all ranks: a person may start them, node by node."""
_GREETING_DEADLINE_S = 10.0
_START = """waiting for the {count} ranks of the trainer; on every node (NODES times RANKS are {count}):
  {address}={listen} {key}=$(cat {file}) torchrun --nnodes NODES --nproc-per-node RANKS --rdzv-backend c10d \
--rdzv-endpoint FIRST_NODE:29500 -m upspiral.trainer.rank"""


async def torchrun_ranks(listen: str, count: int, folder: Path, tell: Callable[[str], None]) -> list[ProcessRank]:
    """`listen`: HOST:PORT of this machine, as the ranks know it. `folder`: of the run; the key by which ranks are
    known lies there while they are awaited. Raises ConfigError when it cannot listen there."""
    file = (folder / "trainer.key").resolve()
    with _listening(listen) as server, _key_in(file) as key:
        tell(_START.format(count=count, address=ADDRESS, listen=listen, key=KEY, file=file))
        return await accept_ranks(server, count, key)


async def accept_ranks(
    server: socket.socket, count: int, key: str, *, deadline_s: float = CONNECT_DEADLINE_S
) -> list[ProcessRank]:
    """All ranks, in the order of their numbers. `server` listens at what their UPSPIRAL_TRAINER says, `key` is their
    UPSPIRAL_TRAINER_KEY. Others who connect are turned away. Raises ConfigError when torchrun starts another number."""
    found: dict[int, Connection] = {}
    server.setblocking(False)
    with ExitStack() as connections:
        try:
            async with asyncio.timeout(deadline_s):
                while len(found) < count:
                    accepted, _ = await asyncio.get_running_loop().sock_accept(server)
                    if (welcome := await asyncio.to_thread(_welcome, accepted, key)) is None:
                        continue
                    number, started, connection = welcome
                    found[number] = connections.enter_context(connection)
                    if started != count:
                        raise ConfigError(
                            f"trainer.parallel.ranks = {count}, but torchrun started {started}; --nnodes times "
                            "--nproc-per-node must be that number"
                        )
        except TimeoutError:
            missing = sorted({*range(count)} - {*found})
            raise DeadlineError(
                f"{len(found)} of the trainer's {count} ranks connected within {deadline_s:.0f} s, and not {missing}; "
                "start torchrun on every node, and see there why a rank does not come"
            ) from None
        connections.pop_all()
    return [ProcessRank(found[number], None, None) for number in range(count)]


def _welcome(accepted: socket.socket, key: str) -> tuple[int, int, Connection] | None:
    """Its number, how many there are, and the connection to a rank; None for who is none, or says nothing."""
    accepted.setblocking(True)
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(_GREETING_DEADLINE_S))
    connection = Connection(accepted.detach())
    try:
        deliver_challenge(connection, key.encode())
        answer_challenge(connection, key.encode())
        number, started = (int(each) for each in connection.recv())
    except (OSError, EOFError, AuthenticationError, ValueError):
        connection.close()
        return None
    with socket.socket(fileno=os.dup(connection.fileno())) as patient:
        patient.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(0.0))
    return number, started, connection


def _timeval(seconds: float) -> bytes:
    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


def _listening(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        return socket.create_server((host, int(port)))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f'trainer.parallel.listen = "{address}": this machine cannot listen there ({error}); give an address of it '
            "that the ranks can reach, and a port that is free"
        ) from error


@contextmanager
def _key_in(file: Path) -> Iterator[str]:
    """A new one, in a file that only its owner reads."""
    file.unlink(missing_ok=True)  # of a run that was killed
    key = secrets.token_hex(32)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as output:
        output.write(key)
    try:
        yield key
    finally:
        file.unlink(missing_ok=True)
