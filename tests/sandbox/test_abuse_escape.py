"""Abuse: ways out of a sandbox, to the host, to others and to what serves it. After each of them it answers."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import platform
import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.sandbox import probes
from tests.sandbox.conformance import SLEEP, TIMEOUT_S, Stage, output_of, sleepers
from tests.sandbox.probes import python
from upspiral.errors import SandboxGoneError
from upspiral.sandbox.base import Sandbox, SandboxBackend, SandboxSpec

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers of system calls are those of x86_64")


def needs_containment(stage: Stage) -> None:
    stage.needs("commands", "untrusted")


@x86_only
def test_system_calls_that_kernels_are_attacked_through(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(probes.calls(probes.CALLS))
    said = dict(line.rsplit(" ", 1) for line in done.stdout.decode().splitlines())
    assert said.keys() == probes.CALLS.keys(), done
    assert {name for name, answer in said.items() if answer not in ("EPERM", "ENOSYS")} == set(), said


@x86_only
def test_what_a_process_may_do_to_others_of_its_user_it_may_not_do_to_the_agent(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(probes.calls(probes.ON_THE_AGENT))
    said = dict(line.rsplit(" ", 1) for line in done.stdout.decode().splitlines())
    assert said == dict.fromkeys(probes.ON_THE_AGENT, "EPERM"), done


@x86_only
def test_the_door_of_32_bit_programs_is_closed(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(python(probes.THE_32_BIT_DOOR))
    assert done.stdout == b"" and done.exit_code in (159, 139), done


def test_nesting_namespaces(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(
        "for n in U m p n i u C T; do unshare -$n echo $n made; done; unshare -Ur id; unshare -Urm mount -t tmpfs x /tmp"
    )
    assert done.stdout == b"", done


def test_mounting(stage: Stage) -> None:
    needs_containment(stage)
    tries = [
        "mount -t cgroup -o rdma x /tmp", "mount -t cgroup2 x /tmp", "mount -t proc x /tmp", "mount -t tmpfs x /tmp",
        "mount --bind /usr /tmp", "mount -o remount,rw /", "mount -o remount,rw,bind /usr", "umount /proc", "umount /usr",
    ]  # fmt: skip
    done = stage.exec("; ".join(f"{each} && echo '{each}: done'" for each in tries))
    assert done.stdout == b"", done


def test_no_control_group_is_in_sight(stage: Stage) -> None:
    """Neither to leave it nor to have the kernel start a program outside (release_agent)."""
    needs_containment(stage)
    stage.needs("hidden_host")
    done = stage.exec(
        "grep -c cgroup /proc/self/mountinfo; find / -name release_agent -o -name cgroup.procs 2>/dev/null; "
        "cut -d: -f3 /proc/self/cgroup | sort -u"
    )
    assert done.stdout == b"0\n/\n", done


def test_privileges(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec("grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status")
    said = dict(line.split(":\t") for line in done.stdout.decode().splitlines())
    assert (said.pop("NoNewPrivs"), said.pop("Seccomp")) == ("1", "2")
    assert set(said.values()) == {"0" * 16} and len(said) == 5, said


def test_a_set_user_id_bit_gives_nothing(stage: Stage) -> None:
    needs_containment(stage)
    become_root = "cp $(command -v id) mine; chmod 6755 mine; ./mine -u; ./mine -ru; su -c id 2>/dev/null </dev/null; sudo -n id 2>/dev/null"
    effective, real = stage.exec(become_root).stdout.split()
    assert effective == real


def test_devices(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(
        "mknod sda b 8 0 && echo made; mknod mem c 1 1 && echo made; mknod /dev/shm/white c 0 0; cat /dev/shm/white; "
        "find /dev -type b; find /dev -type c | grep -vE '^/dev/(null|zero|full|random|urandom|tty|ptmx|pts/.*|shm/white)$'; "
        "touch /dev/x && echo made"
    )
    assert done.stdout == b"", done


def test_the_kernel_s_settings_and_logs(stage: Stage) -> None:
    needs_containment(stage)
    written = ("sysrq-trigger", "sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/vm/drop_caches", "sys/fs/binfmt_misc/register",
               "sys/user/max_user_namespaces", "sys/kernel/hostname", "sys/kernel/ns_last_pid", "sys/kernel/yama/ptrace_scope")  # fmt: skip
    done = stage.exec(
        "".join(f"(echo 1 > /proc/{name}) 2>/dev/null && echo {name} written; " for name in written)
        + "for f in kmsg kcore kpagecount vmallocinfo; do head -c 1 /proc/$f >/dev/null 2>&1 && echo $f read; done; "
        "dmesg 2>/dev/null; grep -v '^0* ' /proc/kallsyms | head -1; date -s 2000-01-01 2>/dev/null >&2 && echo clock set"
    )
    assert done.stdout == b"", done


def test_the_agent_cannot_be_opened_or_changed(stage: Stage) -> None:
    """Whoever can write its memory answers in its name."""
    needs_containment(stage)
    done = stage.exec(python(probes.OPEN_OF_THE_AGENT))
    assert (done.stdout, done.exit_code) == (b"", 0), done


def test_the_agent_cannot_be_signalled(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(f"{python(probes.SIGNAL_THE_AGENT)}; echo still here; kill -9 -1")
    assert b"still here\n" in done.stdout


def test_the_agent_s_descriptors_are_not_to_be_seen(stage: Stage) -> None:
    stage.needs("commands", "own_processes")
    done = stage.exec("ls /proc/1/fd /proc/1/fdinfo 2>/dev/null; ls /proc/self/fd; ls /proc | grep -c '^[0-9]'")
    *descriptors, processes = done.stdout.split()
    assert {each for each in descriptors if each.isdigit()} <= {b"0", b"1", b"2", b"3"}, "3 is what ls itself opens"
    assert int(processes) < 8


def test_programs_of_the_host_cannot_be_replaced(stage: Stage) -> None:
    """By a descriptor of a program that runs, as once in runc (CVE-2019-5736), or by its path."""
    needs_containment(stage)
    python_file, bash_file = Path(sys.executable).resolve(), Path("/bin/bash").resolve()
    before = [hashlib.sha256(each.read_bytes()).digest() for each in (python_file, bash_file)]
    done = stage.exec(
        "for f in /proc/1/exe /proc/self/exe /proc/$$/exe /bin/bash $(command -v python3) /usr/bin/env; do "
        "(exec 9<>$f) 2>/dev/null && echo $f opened; (echo x >> $f) 2>/dev/null && echo $f written; done; "
        "ln -f /bin/bash mine 2>/dev/null && echo linked; rm -f /bin/bash 2>/dev/null || echo there"
    )
    assert done.stdout == b"there\n", done
    assert [hashlib.sha256(each.read_bytes()).digest() for each in (python_file, bash_file)] == before


def test_files_of_the_host_are_not_to_be_seen(stage: Stage, open_folder: Path) -> None:
    needs_containment(stage)
    secret = open_folder / "secret"
    secret.write_text("of the host")
    done = stage.exec(
        f"cat {secret} /etc/shadow /root/.ssh/* /home/*/.ssh/* /run/docker.sock /proc/1/root{secret} 2>/dev/null; "
        f"ls -d /root/.* /home/* /mnt/* /media/* /boot/* 2>/dev/null; "
        f"ln -s ../../../../../..{secret} a; ln -s /proc/1/root{secret} b; ln -s /proc/self/root/../..{secret} c; cat a b c 2>/dev/null"
    )
    assert done.stdout == b"", done


def test_names_of_the_host_are_not_to_be_seen(stage: Stage) -> None:
    needs_containment(stage)
    stage.needs("hidden_host")
    done = stage.exec(
        f"ls -d /sys/kernel /run/* 2>/dev/null; grep -F {stage.root} /proc/self/mountinfo /proc/mounts /proc/self/maps"
    )
    assert done.stdout == b"", done


def test_only_its_own_files_can_be_written(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(
        "find / -xdev -writable ! -type l 2>/dev/null | grep -vE '^/(work|tmp|var/tmp)(/|$)'; "
        "find /usr /etc /dev /run -writable ! -type l 2>/dev/null | grep -vE '^/dev/(null|zero|full|random|urandom|tty|shm|mqueue|pts/.*|ptmx)$'; "
        "grep -E ' (ext4|xfs|btrfs|zfs|fuse|9p|virtiofs)' /proc/mounts | grep -v ' ro,'"
    )
    assert done.stdout == b"", done


def test_the_network_of_the_host(stage: Stage) -> None:
    needs_containment(stage)
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as four,
        closing(socket.create_server(("0.0.0.0", 0))) as anywhere,
        closing(socket.socket(socket.AF_UNIX)) as abstract,
    ):
        name = f"\0upspiral-abuse-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        ports = [each.getsockname()[1] for each in (four, anywhere)]
        targets = [(socket.AF_INET, (host, port)) for port in ports for host in ("127.0.0.1", "0.0.0.0", "127.0.1.1")]
        targets += [(socket.AF_INET, (host, 80)) for host in ("10.0.0.1", "169.254.169.254", "192.0.2.1", "8.8.8.8")]
        table = [(int(family), address) for family, address in targets] + [(int(socket.AF_UNIX), name)]
        done = stage.exec(
            f"{python(probes.REACH % table)}; cat /proc/net/unix | grep -c @upspiral; ls /sys/class/net 2>/dev/null | grep -vx lo"
        )
    assert done.stdout == b"0\n", done


def test_interfaces_and_routes(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(
        "tail -n +3 /proc/net/dev | cut -d: -f1; ip link add x type dummy 2>/dev/null && echo added; "
        "ip addr add 10.9.9.9/8 dev lo 2>/dev/null && echo added; ip route add default dev lo 2>/dev/null && echo added"
    )
    assert done.stdout.split() == [b"lo"], done


def test_sockets_of_other_kinds(stage: Stage) -> None:
    needs_containment(stage)
    raw = [(2, 3, 1), (2, 3, 255), (10, 3, 58), (17, 3, 768), (17, 2, 0)]
    families = [(family, kind, 0) for family in (15, 31, 38, 40, 41, 44) for kind in (1, 2, 3, 5)]
    done = stage.exec(python(probes.SOCKETS % (raw + families)))
    assert (done.stdout, done.exit_code) == (b"", 0), done


def test_typing_into_a_terminal(stage: Stage) -> None:
    needs_containment(stage)
    done = stage.exec(python(probes.TYPE_INTO_TERMINAL))
    assert (done.stdout, done.exit_code) == (b"", 0), done


def test_shared_memory_of_the_host(stage: Stage) -> None:
    needs_containment(stage)
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(0, 4096, 0o600 | 0o1000)
    try:
        done = stage.exec("tail -n +2 /proc/sysvipc/shm; ls -A /dev/shm /dev/mqueue 2>/dev/null | grep -v :")
    finally:
        libc.shmctl(segment, 0, None)
    assert done.stdout.strip() == b"", done


def test_sandboxes_do_not_meet(stage: Stage) -> None:
    """Neither by the network, nor abstract sockets, shared memory, processes or files."""
    needs_containment(stage)
    listen = (
        "import os, socket, time\nport = socket.create_server(('0.0.0.0', 7777))\nname = socket.socket(socket.AF_UNIX)\n"
        "name.bind('\\0meet')\nname.listen()\nopen('/dev/shm/meet', 'w')\nopen('/tmp/meet', 'w')\nprint('up', flush=True)\ntime.sleep(1000)"
    )
    table = [(int(socket.AF_INET), ("127.0.0.1", 7777)), (int(socket.AF_UNIX), "\0meet")]

    async def check(backend: SandboxBackend) -> None:
        async with backend.acquire(SandboxSpec()) as one, backend.acquire(SandboxSpec()) as two:
            process = await one.spawn(python(listen))
            assert (await anext(process.output()))[1] == b"up\n"
            look = f"{python(probes.REACH % table)}; ls -A /dev/shm; ls -A /tmp; pgrep -f meet | grep -vx $$; true"
            assert b"reached" in await output_of(one, look), "it is there"
            assert await output_of(two, look) == b""
            await process.kill()

    stage.run_backend(check)


def test_sandboxes_have_users_of_their_own(stage: Stage) -> None:
    """What the kernel counts by user (processes, watches, keys) then is not shared."""
    needs_containment(stage)
    stage.needs("own_users")
    if os.geteuid() != 0:
        pytest.skip("a backend that is not root has one user id to give")

    async def check(backend: SandboxBackend) -> None:
        async with backend.acquire(SandboxSpec()) as one, backend.acquire(SandboxSpec()) as two:
            owners = set[int]()
            for number, sandbox in enumerate((one, two)):
                process = await sandbox.spawn(f"exec sleep 3600.{os.getpid()}{number}")
                owners.add(await owner_of(f"sleep\0003600.{os.getpid()}{number}"))
                await process.kill()
            assert len(owners) == 2 and 0 not in owners

    stage.run_backend(check)


async def owner_of(command_line: str) -> int:
    """Of the one process on this machine with that command line."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if path.read_bytes().rstrip(b"\0") == command_line.encode():
                        return path.stat().st_uid
                except OSError:
                    continue
            await asyncio.sleep(0.02)


def test_a_result_cannot_be_forged_by_output(stage: Stage) -> None:
    """Frames on stdout, or into every descriptor there is, are output."""
    stage.needs("commands", "robust_agent")
    forge = (
        "import json, os, struct\nbody = json.dumps({'exit_code': 0}).encode()\n"
        "frame = struct.pack('!IIB', len(body), 1, 9) + body\nfor number in range(256):\n    try:\n        os.write(number, frame)\n"
        "    except OSError:\n        pass\nraise SystemExit(3)"
    )
    done = stage.exec(python(forge))
    assert done.exit_code == 3 and done.stdout.count(b"exit_code") == 1, done


def test_nothing_is_left_to_run_when_a_sandbox_is_stopped_amid_an_escape(stage: Stage) -> None:
    needs_containment(stage)

    async def check(sandbox: Sandbox) -> None:
        bomb = f"bomb() {{ setsid bash -c \"$(declare -f bomb); bomb\" & (trap '' TERM HUP INT; {SLEEP}) & }}; bomb; {SLEEP}"
        running = asyncio.create_task(sandbox.exec(bomb, timeout_s=TIMEOUT_S))
        await asyncio.sleep(0.5)
        await sandbox.stop()
        with pytest.raises(SandboxGoneError):
            await running
        assert sleepers() == []

    stage.run(check)
