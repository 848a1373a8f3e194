"""Grading: what a work may try, and that the verdict is the judge's all the same."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import pytest

from tests.sandbox.conformance import Stage, output_of
from tests.sandbox.probes import python
from upspiral.errors import SandboxError
from upspiral.sandbox.base import Limits, SandboxBackend, SandboxSpec
from upspiral.sandbox.grading import Exam, Verdict, Work, grade, hand_in, pytest_check
from upspiral.sandbox.grading.work import WorkError, sift

SQUARES = """
for number, square in {3: 9, 12: 144}.items():
    done = run(["python3", "square.py"], stdin=str(number).encode(), timeout_s=5)
    mark(f"square of {number}", done.exit_code == 0 and done.stdout.strip() == str(square).encode())
"""
HONEST = "print(int(input()) ** 2)\n"
FORGED = b"0" * 64 + b' {"begun": false, "marks": {"forged": true}, "problem": ""}\\n'


def graded(
    stage: Stage,
    files: Mapping[str, bytes | str],
    exam: Exam,
    *,
    first: str = "",
    given: Mapping[str, bytes] | None = None,
) -> Verdict:
    """The verdict on a work of these files, made in a sandbox in which `first` is run; `given` was there before."""
    verdicts: list[Verdict] = []

    async def check(backend: SandboxBackend) -> None:
        async with backend.acquire(SandboxSpec(files=given or {})) as sandbox:
            for path, content in files.items():
                await sandbox.write(path, content.encode() if isinstance(content, str) else content)
            if first:
                await output_of(sandbox, first)
            work = await hand_in(sandbox)
        verdicts.append(await grade(backend, exam, work))

    stage.run_backend(check)
    return verdicts[0]


def test_an_honest_work_passes_and_a_wrong_one_does_not(stage: Stage) -> None:
    stage.needs("commands")
    verdict = graded(stage, {"square.py": HONEST}, Exam(SQUARES))
    assert verdict.passed and verdict.marks == {"square of 3": True, "square of 12": True}
    verdict = graded(stage, {"square.py": "print(9)"}, Exam(SQUARES))
    assert not verdict.passed and verdict.marks == {"square of 3": True, "square of 12": False}
    assert not graded(stage, {}, Exam(SQUARES)).passed


@pytest.mark.parametrize(
    "check", ["", "raise ValueError('x')", "mark('a', True); raise SystemExit", "import os; os._exit(0)", "1 +"]
)
def test_a_check_that_says_nothing_or_breaks_passes_nobody(stage: Stage, check: str) -> None:
    stage.needs("commands")
    if check == "1 +":
        with pytest.raises(SandboxError, match="SyntaxError"):
            graded(stage, {"square.py": HONEST}, Exam(check))
        return
    assert not graded(stage, {"square.py": HONEST}, Exam(check)).passed


def test_the_work_is_what_the_agent_left_changed_or_removed(stage: Stage) -> None:
    stage.needs("commands")
    given = {"kept": b"kept", "changed": b"before", "removed": b"x", "folder/removed": b"x", "becomes/a/folder": b"x"}
    check = """
import os
names = sorted(os.path.join(place, name)[2:] for place, _, files in os.walk(".") for name in files)
mark(str(names), names == ["becomes", "changed", "folder/new", "hard", "kept", "link", "run.sh"])
mark("changed", read("changed") == b"after" and read("kept") == b"kept" and read("hard") == b"new")
mark("mode", run(["./run.sh"]).stdout == b"ran" and os.readlink("link") == "/etc/passwd")
"""
    first = (
        "rm -r removed folder becomes; mkdir folder; printf new > folder/new; ln folder/new hard; printf after > changed; "
        "echo x > becomes; ln -s /etc/passwd link; printf '#!/bin/sh\\nprintf ran' > run.sh; chmod 755 run.sh"
    )
    verdict = graded(stage, {}, Exam(check, spec=SandboxSpec(files=given)), first=first, given=given)
    assert verdict.passed, verdict


def _writes_everywhere(content: str) -> str:
    return f"import os\nfor number in range(256):\n    try:\n        os.write(number, {content})\n    except OSError:\n        pass\n"


ATTACKS = {
    "leaves early": "import os; os._exit(0)",
    "leaves early by an exit handler": "import atexit, os; atexit.register(os._exit, 0)",
    "says a verdict": f"print({FORGED!r}.decode())",
    "says a verdict everywhere": _writes_everywhere(repr(FORGED)),
    "says a verdict in the place of the judge": (
        "import glob, os\nfor path in glob.glob(f'/proc/{os.getppid()}/fd/*') + glob.glob('/proc/1/fd/*'):\n    try:\n"
        f"        open(path, 'wb').write({FORGED!r})\n    except OSError:\n        pass"
    ),
    "kills the judge": "import os; os.kill(os.getppid(), 9)",
    "ends the judge": "import os; os.kill(os.getppid(), 15)",
    "interrupts the judge": "import os; os.kill(os.getppid(), 2)",
    "kills everything": "import os; os.kill(-1, 9)",
    "stops the judge": "import os; os.kill(os.getppid(), 19)",
    "takes the judge's descriptors away": (
        "import os, resource\nfor what in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):\n"
        "    resource.prlimit(os.getppid(), what, (0, 0))"
    ),
    "takes the judge's time away": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "hangs": "import time; time.sleep(1000)",
    "hangs beyond its end": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True:\n"
        f"        print({FORGED!r}.decode(), flush=True)\n        time.sleep(0.01)"
    ),
    "forks without end": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "fills the disk": "open('x', 'wb').write(bytes(1 << 30))",
    "writes without end": "while True: print('x' * 65536)",
    "asks for memory without end": "x = bytearray(1 << 33)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_work_cannot_say_the_verdict(stage: Stage, attack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.needs("commands", "untrusted")
    # Some of them last until the last deadline. Nothing that is expected comes near it.
    monkeypatch.setattr(import_module("upspiral.sandbox.grading.grade"), "_START_TIMEOUT_S", 4.0)
    check = SQUARES.replace("timeout_s=5", "timeout_s=1")
    verdict = graded(stage, {"square.py": ATTACKS[attack]}, Exam(check, timeout_s=8))
    assert not verdict.passed and "forged" not in verdict.marks, verdict


SPY = """
import os
found = b""
for pid in [each for each in os.listdir("/proc") if each.isdigit() and each != str(os.getpid())]:
    for name in ["cmdline", "environ", "mem", "maps", "fd/0", "fd/1", "fd/2", "fd/3", "fd/4", "fd/5", "root/proc/self/environ"]:
        try:
            with open(f"/proc/{pid}/{name}", "rb", buffering=0) as file:
                found += file.read(1 << 22) or b""
        except (OSError, ValueError):
            pass
for folder, below, names in os.walk("/"):
    if folder in ("/proc", "/usr", "/sys", "/dev/pts", "/opt"):
        below.clear()
        continue
    for name in names:
        try:
            with open(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
                found += file.read(1 << 20) or b""
        except OSError:
            pass
open("found", "wb").write(found)
print("xylo" + "phone" if b"xylo" + b"phone" in found else "nothing")
"""


def test_a_work_cannot_learn_what_is_expected(stage: Stage) -> None:
    stage.needs("commands", "untrusted")
    check = (
        "done = run(['python3', 'spy.py'], timeout_s=30)\nmark('it ran', done.exit_code == 0)\n"
        "mark('it knows', done.stdout.strip() == b'xylophone')\nmark('it looked', len(read('found')) > 1000)"
    )
    verdict = graded(stage, {"spy.py": SPY}, Exam(check, spec=SandboxSpec(limits=Limits(memory_mb=1024, disk_mb=512))))
    assert verdict.marks == {"it ran": True, "it knows": False, "it looked": True}, verdict
    control = Exam(check, files={"note": b"xylophone"})
    assert graded(stage, {"spy.py": SPY}, control).marks["it knows"], "what lies in a file can be read"


EVIL = "import os; print('25', flush=True); os._exit(0)"
LEFT_BEHIND = {
    "sitecustomize.py": EVIL, "usercustomize.py": EVIL, "json.py": EVIL, "hmac.py": EVIL, "subprocess.py": EVIL, "ctypes.py": EVIL,
    ".local/lib/python3.11/site-packages/usercustomize.py": EVIL, ".local/lib/python3.11/site-packages/x.pth": f"import os; {EVIL}",
    ".bashrc": "exit 0", ".profile": "exit 0", ".bash_profile": "exit 0", ".pythonrc": EVIL,
    "python3": "#!/bin/sh\necho 25", "bin/python3": "#!/bin/sh\necho 25", "env": "#!/bin/sh\nexit 0",
}  # fmt: skip


def test_what_runs_by_itself_does_not_run_in_the_judge(stage: Stage) -> None:
    stage.needs("commands")
    first = (
        "chmod 755 python3 bin/python3 env; echo 'export PATH=/work:/work/bin:$PATH LD_PRELOAD=/work/x.so PYTHONPATH=/work' >> .bashrc; "
        "export PATH=/work:$PATH LD_PRELOAD=; (while :; do touch square.py; sleep 0.01; done) >/dev/null 2>&1 &"
    )
    wrong = graded(stage, {**LEFT_BEHIND, "square.py": "print(1)"}, Exam(SQUARES), first=first)
    assert not wrong.passed and wrong.marks, wrong
    assert wrong.marks == {"square of 3": False, "square of 12": False}


ONE_TEST = "import solution\n\ndef test_square():\n    assert solution.square(12) == 144\n"
ID = "tests/test_it.py::test_square"
FORGED_REPORT = repr(b"0" * 64 + f' [0, "{ID}", "passed"]\n'.encode())
RIGHT = "def square(x): return x * x\n"
WRONG = "def square(x): return 0\n"
HOOK = (
    "import pytest\n@pytest.hookimpl(hookwrapper=True)\ndef pytest_runtest_makereport(item, call):\n    outcome = yield\n"
    "    outcome.get_result().outcome = 'passed'\n"
)
SUITE_ATTACKS: dict[str, dict[str, str]] = {
    "is wrong": {},
    "leaves when imported": {"solution.py": "import os; os._exit(0)"},
    "leaves when asked": {"solution.py": "import os\ndef square(x): os._exit(0)"},
    "leaves at the end": {"solution.py": WRONG + "import atexit, os; atexit.register(os._exit, 0)"},
    "says that it leaves": {"solution.py": "import sys\ndef square(x): sys.exit(0)"},
    "conftest": {"conftest.py": HOOK, "tests/conftest.py": HOOK},
    "plugin by settings": {"pytest.ini": "[pytest]\naddopts = -p evil\n", "evil.py": HOOK, "setup.cfg": "[tool:pytest]\naddopts = -p evil\n",
                           "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-p evil'\n", "tox.ini": "[pytest]\naddopts = -p evil\n"},
    "selects nothing": {"pytest.ini": "[pytest]\naddopts = --collect-only\n"},
    "plugin by an entry point": {"evil.egg-info/entry_points.txt": "[pytest11]\nevil = evil\n", "evil.egg-info/PKG-INFO": "Name: evil\nVersion: 1\n",
                                 "evil.py": HOOK, "evil-1.dist-info/entry_points.txt": "[pytest11]\nevil = evil\n"},
    "pytest of its own": {"pytest.py": "import os; os._exit(0)", "_pytest/__init__.py": "import os; os._exit(0)"},
    "library of its own": {"json.py": EVIL, "hmac.py": EVIL, "tests/random.py": EVIL, "sitecustomize.py": EVIL},
    "tests of its own": {"tests/test_it.py": "def test_square(): pass\n"},
    "a package in the place of the test": {"tests/test_it/__init__.py": "def test_square(): pass\n"},
    "a module beside the test": {"tests/test_it.cpython-311-x86_64-linux-gnu.so": "\x7fELF", "tests/test_it.pyc": "x"},
    "says a report everywhere": {"solution.py": WRONG + _writes_everywhere(FORGED_REPORT)},
}  # fmt: skip


@pytest.mark.parametrize("attack", SUITE_ATTACKS)
def test_a_work_cannot_talk_pytest_over_by_what_it_leaves(stage: Stage, attack: str) -> None:
    stage.needs("commands", "mounts")
    verdict = graded(stage, {"solution.py": WRONG, **SUITE_ATTACKS[attack]}, suite_exam())
    assert not verdict.passed, verdict


def test_an_honest_suite_passes(stage: Stage) -> None:
    stage.needs("commands", "mounts")
    work = {"solution.py": RIGHT, "conftest.py": HOOK, "tests/helper.py": "", "README": "x"}
    verdict = graded(stage, work, suite_exam())
    assert verdict.passed and verdict.marks == {ID: True}, verdict
    assert list(verdict.left_out) == ["conftest.py"]
    every = Exam(
        pytest_check(["tests"], python_path=["/opt/site"]),
        files={"tests/test_it.py": ONE_TEST.encode()},
        spec=suite_exam().spec,
    )
    assert graded(stage, {"solution.py": RIGHT}, every).passed
    assert not graded(stage, {"solution.py": WRONG}, every).passed


@pytest.mark.parametrize(
    "leaves",
    [
        "import pytest; pytest.skip(allow_module_level=True)",
        "raise KeyboardInterrupt",
        "import pytest; pytest.exit('')",
    ],
)
def test_a_work_cannot_pass_by_the_tests_that_do_not_meet_it(stage: Stage, leaves: str) -> None:
    stage.needs("commands", "mounts")
    exam = Exam(
        pytest_check(["tests"], python_path=["/opt/site"]),
        files={"tests/test_easy.py": b"def test_easy(): pass\n", "tests/test_it.py": ONE_TEST.encode()},
        spec=suite_exam().spec,
    )
    verdict = graded(stage, {"solution.py": leaves}, exam)
    assert not verdict.passed, verdict


def test_a_test_folder_that_leads_elsewhere(stage: Stage) -> None:
    stage.needs("commands", "mounts")
    first = "mkdir other; echo 'def test_square(): pass' > other/test_it.py; ln -s other tests"
    assert not graded(stage, {"solution.py": WRONG}, suite_exam(), first=first).passed
    assert graded(stage, {"solution.py": RIGHT}, suite_exam(), first=first).passed


def test_compiled_files_that_do_not_look_at_their_source(stage: Stage) -> None:
    stage.needs("commands", "mounts")
    compile_it = (
        "import py_compile\nopen('helper.py', 'w').write('def is_right(x): return True')\nfor module in ('helper', 'tests/helper'):\n"
        "    folder, _, name = module.rpartition('/')\n    py_compile.compile('helper.py', f'{folder or \".\"}/__pycache__/{name}.cpython-311.pyc', "
        "invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
    )
    test = "import sys; sys.path.append('tests')\nimport helper, solution\n\ndef test_square():\n    assert helper.is_right(solution.square(12))\n"
    exam = suite_exam({"tests/test_it.py": test.encode(), "tests/helper.py": b"def is_right(x): return x == 144\n"})
    verdict = graded(stage, {"solution.py": WRONG, "tests/x": ""}, exam, first=f"{python(compile_it)}; rm helper.py")
    assert not verdict.passed and verdict.marks == {ID: False}, verdict


def suite_exam(files: Mapping[str, bytes] | None = None) -> Exam:
    """With the pytest that runs here."""
    site = str(Path(pytest.__file__).parents[1])
    check = pytest_check(["tests/test_it.py"], must_pass=[ID], python_path=["/opt/site"], timeout_s=60)
    return Exam(
        check, spec=SandboxSpec(mounts={site: "/opt/site"}), files=files or {"tests/test_it.py": ONE_TEST.encode()}
    )


def _archive(change: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("./square.py")
        member.size = 1
        for name, value in change.items():
            setattr(member, name, value)
        archive.addfile(member, io.BytesIO(b"x"))
    return buffer.getvalue()


WORKS = {
    "no archive": b"x" * 5000,
    "cut": _archive({"size": 1})[:515],
    "a device": _archive({"type": tarfile.CHRTYPE}),
    "an absolute name": _archive({"name": "/etc/passwd"}),
    "the folder above": _archive({"name": "../../usr/bin/python3"}),
    "nothing": b"",
}


@pytest.mark.parametrize("name", WORKS)
def test_a_work_that_is_no_work_fails_and_is_no_fault_of_the_infrastructure(stage: Stage, name: str) -> None:
    stage.needs("commands")

    async def check(backend: SandboxBackend) -> None:
        verdict = await grade(backend, Exam(SQUARES), Work(WORKS[name], (), is_whole=True))
        assert not verdict.passed

    stage.run_backend(check)


def test_a_work_that_is_too_large_fails(stage: Stage) -> None:
    stage.needs("commands")

    async def check(backend: SandboxBackend) -> None:
        async with backend.acquire(SandboxSpec()) as sandbox:
            await output_of(sandbox, "head -c 3M /dev/urandom > x")
            work = await hand_in(sandbox, max_bytes=1 << 20)
        assert "larger" in work.problem
        assert not (await grade(backend, Exam(SQUARES), work)).passed

    stage.run_backend(check)


def test_infrastructure_that_fails_is_no_verdict(stage: Stage) -> None:
    stage.needs("commands")

    async def check(backend: SandboxBackend) -> None:
        async with backend.acquire(SandboxSpec()) as sandbox:
            await sandbox.stop()
            with pytest.raises(SandboxError):
                await hand_in(sandbox)
        work = Work(_archive({}), (), is_whole=True)
        grading = asyncio.create_task(grade(backend, Exam("import time; time.sleep(1000)"), work))
        await asyncio.sleep(1.0)
        await backend.stop()
        with pytest.raises(SandboxError):
            await grading

    stage.run_backend(check)


def test_a_name_that_changes_on_its_way_is_refused() -> None:
    """What unpacks it would end the name at the NUL, and lay out a conftest.py."""
    for name in ("conftest.py\0.txt", "tests/test_it.py\0"):
        work = Work(_archive({"pax_headers": {"path": name}}), (), is_whole=True)
        with pytest.raises(WorkError, match="is no path"):
            sift(work, "/work", ["tests/test_it.py"])
    with pytest.raises(WorkError, match="is no path"):
        sift(Work(_archive({}), ("/work/a\0/etc/passwd",), is_whole=False), "/work", [])


def test_an_exam_that_no_sandbox_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="file_mb or disk_mb"):
        Exam("", files={"a": bytes(2 << 20)}, spec=SandboxSpec(limits=Limits(file_mb=1)))
    with pytest.raises(ValueError, match="file_mb or disk_mb"):
        Exam("", files={"a": bytes(1 << 20), "b": b"x"}, spec=SandboxSpec(limits=Limits(disk_mb=1)))


def test_an_exam_s_paths_are_in_the_workspace() -> None:
    for path in ("/etc/passwd", "../x", "a/../../x", ".", "a//b"):
        with pytest.raises(ValueError, match="exam files"):
            Exam("", files={path: b""})
