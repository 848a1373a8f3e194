"""Acting as the user whom commands run as."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

from .settings import Settings


@contextlib.contextmanager
def assumed(settings: Settings) -> Iterator[None]:
    """Files that are opened meanwhile are opened with that user's rights. It is the effective id alone that changes:
    who has the same real or saved id as a command could be killed by it."""
    if settings.uid is None:
        yield
        return
    uid, gid = os.geteuid(), os.getegid()
    groups = os.getgroups()
    os.setgroups(settings.groups)
    os.setegid(_gid(settings, settings.uid))
    os.seteuid(settings.uid)
    try:
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)
        os.setgroups(groups)


def become(settings: Settings) -> None:
    """For good: in a child that does a piece of work as that user."""
    if settings.uid is not None:
        gid = _gid(settings, settings.uid)
        os.setgroups(settings.groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(settings.uid, settings.uid, settings.uid)


def start_as(
    settings: Settings,
    program: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    descriptors: tuple[tuple[int, int, int], Sequence[int]],
) -> int:
    """Starts a program as that user, in a session of its own, and returns its process id. `descriptors`: for 0, 1 and
    2, and those that it has by the same numbers. Raises OSError when it cannot start.

    It takes a fork, which is slower than posix_spawn: only a child can take the ids on before it is the program.
    """
    import subprocess  # which agents that are one user need not have in memory

    assert settings.uid is not None
    (stdin, stdout, stderr), inherited = descriptors
    gid = _gid(settings, settings.uid)
    process = subprocess.Popen(
        arguments, executable=program, env=environment, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=inherited,
        start_new_session=True, user=settings.uid, group=gid, extra_groups=settings.groups or (gid,),
    )  # fmt: skip
    process.returncode = 0  # it is the loop that reaps it
    return process.pid


def _gid(settings: Settings, uid: int) -> int:
    return settings.gid if settings.gid is not None else uid
