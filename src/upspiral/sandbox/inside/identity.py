"""Acting as the user whom commands run as."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from .settings import Settings


@contextlib.contextmanager
def assumed(settings: Settings) -> Iterator[None]:
    """Files that are opened and programs that are started meanwhile are that user's.

    The saved user id stays the agent's, so it finds its way back; a program loses it, as execve copies the effective
    one over it. The same holds for capabilities.
    """
    if settings.uid is None:
        yield
        return
    uid, gid = os.geteuid(), os.getegid()
    groups = os.getgroups()
    theirs = _gid(settings, settings.uid)
    os.setgroups(settings.groups)
    os.setresgid(theirs, theirs, gid)
    os.setresuid(settings.uid, settings.uid, uid)
    try:
        yield
    finally:
        os.setresuid(uid, uid, uid)
        os.setresgid(gid, gid, gid)
        os.setgroups(groups)


def become(settings: Settings) -> None:
    """For good: in a child that does a piece of work as that user."""
    if settings.uid is not None:
        gid = _gid(settings, settings.uid)
        os.setgroups(settings.groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(settings.uid, settings.uid, settings.uid)


def _gid(settings: Settings, uid: int) -> int:
    return settings.gid if settings.gid is not None else uid
