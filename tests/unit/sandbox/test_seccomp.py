"""The filter of system calls, installed in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from upspiral.sandbox.namespace.seccomp import filter_program

PROGRAM = """
import ctypes, os, sys
program = bytes.fromhex(sys.argv[1])
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Filter(len(program) // 8, program))) == 0
open("file", "w").close()
os.symlink("file", "link")
handle = os.open("file", os.O_RDONLY)
for give_away in (lambda: os.chown("file", 5, 6), lambda: os.lchown("link", 5, 6), lambda: os.fchown(handle, 5, 6)):
    try:
        give_away()
        print("done", os.stat("file").st_uid == os.getuid())
    except OSError as error:
        print(error.strerror)
libc.unshare(0x10000000)
print(os.strerror(ctypes.get_errno()))
"""


@pytest.mark.skipif(not filter_program(), reason="no filter for this processor")
def test_giving_files_away_is_pretended_where_it_is_asked_for(tmp_path: Path) -> None:
    program = filter_program(pretends_to_give_away=True).hex()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["done True"] * 3 + ["Operation not permitted"], done.stderr
