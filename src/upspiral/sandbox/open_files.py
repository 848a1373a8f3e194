"""How many files this process may have open. Each live sandbox holds one or more."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EMFILE, ENFILE

from upspiral.errors import SandboxBusyError

_RETRY_S = 1.0


def allow_many() -> None:
    """As many as an administrator lets it have, and not the few that are the default for the sake of old programs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def enough_for_a_sandbox() -> Iterator[None]:
    """Raises SandboxBusyError where there are none left: it is no failure of a sandbox, and passes when others end."""
    try:
        yield
    except OSError as error:
        if error.errno not in (EMFILE, ENFILE):
            raise
        raise too_many(f"this process has {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}") from error


def too_many(who: str) -> SandboxBusyError:
    return SandboxBusyError(
        f"there are no open files left for another sandbox: {who}, the limit (RLIMIT_NOFILE). Raise its hard limit, "
        "by `ulimit -Hn`, LimitNOFILE= of systemd or --ulimit nofile= of a container, or have fewer sandboxes",
        retry_after_s=_RETRY_S,
    )
