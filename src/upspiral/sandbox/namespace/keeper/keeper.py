"""The keeper's one thread: takes requests by a socket, one message each, and answers each when it is done.

A message is a JSON object, in both directions. A request has a `number`, and so has its answer, with a `problem` when
it failed. Before its answer, a snapshot's may have a word that it is `sealed`: it can be stood on. Unasked the keeper
says only that a sandbox has `ended`.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from upspiral.sandbox.namespace.keeper import MAX_MESSAGE_BYTES, aside, launch, stuck, syscalls
from upspiral.sandbox.namespace.keeper.aside import Aside
from upspiral.sandbox.namespace.keeper.control_groups import Allowance, Group, find_hierarchies
from upspiral.sandbox.namespace.keeper.identity import Identities
from upspiral.sandbox.namespace.keeper.live import LAST_WORDS_BYTES, Live, is_over
from upspiral.sandbox.namespace.keeper.merged import OPAQUE
from upspiral.sandbox.namespace.keeper.mould import Mould
from upspiral.sandbox.namespace.keeper.order import Order
from upspiral.sandbox.namespace.keeper.pause import paused, resume, runs_nothing_else
from upspiral.sandbox.namespace.keeper.skeleton import MADE, make_dev, make_skeleton
from upspiral.sandbox.namespace.keeper.stack import Layer, Stack
from upspiral.sandbox.namespace.keeper.syscalls import MountFlag, Namespace

_MAX_NAMES_BYTES = 64 << 20
"""Of names and attributes in a difference; of content there may be as much as the disk has room for."""
_MAX_LAYERS = 64
"""Stacks that are deeper are copied into one layer."""
_SETUP_TIMEOUT_S = 30.0
_EXIT_TIMEOUT_S = 10.0
_TICK_S = 0.5
"""How late the end of a lifetime may be."""
_LOOK_S = 4.0
"""How often agents are looked at: who waits in the kernel at two looks is stuck. The host is more patient."""
_SPARE_DESCRIPTORS = 64
"""Not for further sandboxes, so that there are some for what is done with those that live."""

Message = dict[str, Any]


class Keeper:
    """Everything that lives, by its name and by the descriptor that tells of it."""

    def __init__(self, control: socket.socket, host: Message):
        self._control = control
        self._identities = Identities.of_this_process()
        self._hierarchies = find_hierarchies(host["label"], host["parent_group"])
        self._events = select.epoll()
        self._by_descriptor: dict[int, Callable[[], None]] = {}
        self._live: dict[str, Live] = {}
        self._snapshots: dict[str, Stack] = {}
        self._asides: set[Aside] = set()
        self._waiting: set[int] = set()
        """Agents that waited in the kernel at the last look."""
        self._num_layers = 0
        self._most_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._mould: Mould | None = None
        self._may_inspect = self._is_root and syscalls.has_capability(syscalls.CAP_SYS_PTRACE)
        try:
            self._enter(host["folder"])
            self._mould = Mould(launch.Sandboxing.of_this_machine(make_skeleton()))
            make_dev()
            for name in ("t", "layers"):
                os.mkdir(name, 0o755)
        except BaseException:
            self.end()
            raise

    def abilities(self) -> Message:
        """`layers`: overlays on tmpfs can say that a folder replaces another one, so that layers can be stacked."""
        try:
            os.setxattr("layers", OPAQUE, b"n")
            layers = True
        except OSError:  # Linux before 6.6
            layers = False
        return {"control_groups": self._hierarchies is not None, "layers": layers}

    @property
    def _is_root(self) -> bool:
        return self._identities.many

    def _enter(self, folder: str) -> None:
        """Into namespaces of its own, in which it may mount."""
        if self._is_root:
            os.setgroups([])
            syscalls.unshare(Namespace.MOUNT)
        else:
            user, group = os.geteuid(), os.getegid()
            syscalls.unshare(Namespace.USER | Namespace.MOUNT)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        syscalls.make_private("/")
        syscalls.mount("tmpfs", folder, "tmpfs", MountFlag.NOSUID, "mode=755")
        os.chdir(folder)

    def serve(self, end: int) -> None:
        """To the end of the control socket, or until the descriptor `end` can be read from; then raises EOFError."""
        self._watch(self._control.fileno(), self._on_request)
        self._watch(end, _end)
        next_tick = next_look = 0.0
        while True:
            for descriptor, _ in self._events.poll(_TICK_S if self._live or self._asides else None):
                # An earlier event of this round may have ended what this one is about.
                if (react := self._by_descriptor.get(descriptor)) is not None:
                    react()
            if time.monotonic() >= next_tick:
                self._end_overdue()
                next_tick = time.monotonic() + _TICK_S
            if time.monotonic() >= next_look:
                self._free_stuck()
                next_look = time.monotonic() + _LOOK_S

    def _watch(self, descriptor: int, react: Callable[[], None]) -> None:
        self._by_descriptor[descriptor] = react
        self._events.register(descriptor, select.EPOLLIN)

    def _unwatch(self, descriptor: int) -> None:
        del self._by_descriptor[descriptor]
        self._events.unregister(descriptor)

    def _free_stuck(self) -> None:
        waiting = {live.process for live in self._live.values() if live.is_ready and stuck.waits(live.process)}
        for process in waiting & self._waiting:
            stuck.free(process)
        self._waiting = waiting

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for live in self._live.values():
            if not live.is_ready and live.begun_at + _SETUP_TIMEOUT_S <= now:
                live.problem = f"it was not ready within {_SETUP_TIMEOUT_S:g} s"
                live.kill()
            elif live.order.ends_at <= now:
                live.problem = f"it reached the end of its lifetime, {live.order.lifetime_s:g} s"
                live.kill()
        for each in self._asides:
            if each.deadline <= now:
                each.kill()

    def _on_request(self) -> None:
        try:
            content, descriptors, flags, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 4)
        except ConnectionResetError:
            raise EOFError from None
        if not content:
            raise EOFError
        request: Message = json.loads(content)
        try:
            requests: dict[str, Callable[[Message, list[int]], None]] = {
                "create": self._create, "stop": self._stop, "snapshot": self._snapshot, "drop": self._drop,
                "diff": self._diff, "restore": self._restore,
            }  # fmt: skip
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, "no descriptor is free for what came with the request")
            requests[request["do"]](request, descriptors)
        except (OSError, ValueError, ArithmeticError) as error:  # of a limit, too, that no machine has
            self._answer(request["number"], problem=str(error), **self._said_of(error))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, number: int, **said: object) -> None:
        self._send({"number": number, **said})

    def _send(self, message: Message) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            raise EOFError from None

    def _said_of(self, error: Exception) -> Message:
        no_more_files = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        return {"most_open_files": self._most_descriptors} if no_more_files else {}

    # Creating

    def _create(self, request: Message, descriptors: list[int]) -> None:
        # The kernel gives the lowest number that is free.
        if descriptors[0] + _SPARE_DESCRIPTORS > self._most_descriptors:
            raise OSError(errno.EMFILE, f"the descriptors of {len(self._live)} sandboxes are open")
        order = Order(**request["order"])
        order = replace(order, ends_at=time.monotonic() + order.lifetime_s)
        self._launch(order, self._stack_for(order), os.dup(descriptors[0]), self._answering(request))

    def _answering(self, request: Message, **said: object) -> Callable[[str], None]:
        """What tells the host how its request went."""
        number = request["number"]
        return lambda problem: self._answer(number, problem=problem) if problem else self._answer(number, **said)

    def _launch(self, order: Order, stack: Stack, agent: int, when_ready: Callable[[str], None]) -> None:
        """`agent`, a socket, is the sandbox's from here on."""
        try:
            live = self._fork(order, stack, agent, when_ready)
        except OSError as error:
            os.close(agent)
            when_ready(str(error))
            return
        stack.hold()
        self._live[order.name] = live
        self._watch(live.handle, lambda: self._on_death(live))
        self._watch(live.line.fileno(), lambda: self._on_line(live))
        try:
            self._let_go_ahead(live)
        except OSError as error:
            live.problem = str(error)
            live.kill()

    def _fork(self, order: Order, stack: Stack, agent: int, when_ready: Callable[[str], None]) -> Live:
        group = None
        if self._hierarchies is not None:
            allowance = Allowance(order.memory_bytes, order.processes, order.cpus)
            group = self._hierarchies.make(order.name, allowance)
        try:
            plan = launch.Plan.of(order, stack, group).to_json()
            try:
                process, here = self._clone(plan, agent, group)
            except ChildProcessError:  # a child that nobody knows of ends, since its line does
                process, here = self._clone(plan, agent, group)
            return Live(order, stack, agent, process, here, when_ready, group=group)
        except OSError:
            if group is not None:
                group.remove()
            raise

    def _clone(self, plan: bytes, agent: int, group: Group | None) -> tuple[int, socket.socket]:
        """The process, and this end of the line to it."""
        assert self._mould is not None
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        birthplace = None if group is None else group.open_birthplace()
        try:
            return self._mould.cast(plan, [there.fileno(), agent], birthplace), here
        except OSError:
            here.close()
            raise
        finally:
            there.close()
            if birthplace is not None:
                os.close(birthplace)

    def _stack_for(self, order: Order) -> Stack:
        if order.snapshot is None:
            return Stack(self._identities.new(order.user), list(order.layers))
        if order.snapshot not in self._snapshots:
            raise FileNotFoundError(_no_snapshot(order.snapshot))
        return self._snapshots[order.snapshot]

    def _let_go_ahead(self, live: Live) -> None:
        """Gives the child its ids and what it may not open itself."""
        identity = live.stack.identity
        for kind in ("uid_map", "gid_map"):
            _write(f"/proc/{live.process}/{kind}", f"{identity.inside} {identity.outside} 1")
        if not self._may_inspect:
            live.pid_namespace = live.open_pid_namespace()
        given: list[int] = []
        try:
            self._open_trees(live, given)
            if live.group is not None:
                given.append(os.open(live.group.out_of_memory, os.O_RDONLY | os.O_CLOEXEC))
            socket.send_fds(live.line, [launch.GO], given)
        finally:
            for descriptor in given:
                os.close(descriptor)

    def _open_trees(self, live: Live, trees: list[int]) -> None:
        for folder in live.stack.image:
            trees.append(syscalls.clone_tree(folder))
            if self._is_root:
                namespace = os.open(f"/proc/{live.process}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    syscalls.map_owners(trees[-1], namespace)
                finally:
                    os.close(namespace)
        for path in live.order.mounts.values():
            trees.append(syscalls.clone_tree(path))
            syscalls.protect(trees[-1])

    def _on_line(self, live: Live) -> None:
        """The child is ready, or says why it is not, or has died."""
        self._unwatch(live.line.fileno())
        message, descriptors = b"", []
        with suppress(BlockingIOError, ConnectionResetError):  # reset: it died before it had read what was sent to it
            message, descriptors, _, _ = socket.recv_fds(live.line, LAST_WORDS_BYTES, 1, socket.MSG_DONTWAIT)
        live.line.close()
        if message == launch.READY and descriptors:
            live.disk = descriptors[0]
            live.when_ready("")
        else:
            live.problem = live.problem or message.decode(errors="replace") or "it died before it was ready"
            live.kill()

    # Ending

    def _stop(self, request: Message, descriptors: list[int]) -> None:
        live = self._live.get(request["name"])
        if live is None:
            self._answer(request["number"])
        else:
            self._end(live, lambda: self._answer(request["number"]))

    def _end(self, live: Live, then: Callable[[], None]) -> None:
        live.when_dead.append(then)
        live.kill()

    def _on_death(self, live: Live) -> None:
        """Its first process is dead, and so is all that it had started."""
        os.waitpid(live.process, 0)
        self._unwatch(live.handle)
        if not live.is_ready and live.line.fileno() in self._by_descriptor:
            self._on_line(live)
        if live.is_ready and not live.problem:
            live.problem = live.last_words()
        if live.group is not None:
            live.group.remove()
        del self._live[live.order.name]
        if not live.is_ready:
            live.when_ready(live.problem)
        elif not live.when_dead:
            is_over = live.order.ends_at <= time.monotonic()
            self._send({"ended": live.order.name, "problem": live.problem, "is_over": is_over})
        live.forget()
        live.stack.release()
        for react in live.when_dead:
            react()

    def end(self) -> None:
        """Everything that lives, before the keeper itself ends."""
        deadline = time.monotonic() + _EXIT_TIMEOUT_S
        for each in self._asides:
            each.kill()
        if self._mould is not None:
            self._mould.end()
        for live in self._live.values():
            live.kill()
        for live in self._live.values():
            is_over(live.handle, max(0.0, deadline - time.monotonic()))
        if self._hierarchies is not None:
            self._hierarchies.remove()

    # Snapshots

    def _snapshot(self, request: Message, descriptors: list[int]) -> None:
        """`sealed`: the sandbox's disk has become a layer, and a new agent above it has taken over its socket. (Where
        nothing was written, what it stands on is all there is.) `copied`: nothing has changed for the sandbox."""
        live = self._the(request["name"])
        if not live.has_written():
            self._keep(request["snapshot"], live.stack, lambda _: self._answer(request["number"], how="sealed"))
            return
        if request["may_seal"] and not live.has_shared_memory() and runs_nothing_else(live):
            live.stack.hold()
            disk, agent = os.dup(live.disk), os.dup(live.agent)
            self._end(live, lambda: self._seal(live, disk, agent, request))
            return
        layer = self._new_layer()
        live.stack.hold()  # it may end meanwhile

        def copy() -> Message:
            with paused(live):
                return aside.copy_to_layer([live.open_disk()], layer.mounted_at)

        def done(answer: Message) -> None:
            if "problem" in answer:
                self._let_go_on(live)
                layer.discard()
                self._answer(request["number"], **answer)
            else:
                stack = live.stack.topped(layer.measured())
                self._keep(request["snapshot"], stack, lambda _: self._answer(request["number"], how="copied"))
            live.stack.release()

        self._do_aside(copy, done)

    def _seal(self, live: Live, disk: int, agent: int, request: Message) -> None:
        """After its death. `disk` and `agent` are this function's, and it was held what the sandbox stood on."""

        def follow(stack: Stack) -> None:
            self._send({"number": request["number"], "sealed": True})
            self._launch(live.order, stack, agent, self._answering(request, how="sealed"))

        try:
            layer = self._new_layer()
            syscalls.attach(disk, layer.mounted_at)
            self._keep(request["snapshot"], live.stack.topped(layer.measured()), follow)
        except OSError as error:
            os.close(agent)
            self._answer(request["number"], problem=f"the sandbox is lost: {error}")
        finally:
            os.close(disk)
            live.stack.release()

    def _keep(self, name: str, stack: Stack, then: Callable[[Stack], None]) -> None:
        """Makes a snapshot of a stack; a deep one is flattened first, which takes as long as copying it."""
        self._snapshots[name] = stack
        stack.hold()
        if len(stack.layers) <= _MAX_LAYERS:
            then(stack)
            return
        layer = self._new_layer()

        def done(answer: Message) -> None:
            if "problem" in answer:
                layer.discard()
            else:
                self._snapshots[name] = Stack(stack.identity, stack.image, [layer.measured()])
                self._snapshots[name].hold()
                stack.release()
            then(self._snapshots[name])

        self._do_aside(lambda: aside.copy_to_layer([each.open() for each in stack.layers], layer.mounted_at), done)

    def _restore(self, request: Message, descriptors: list[int]) -> None:
        """A new agent on a snapshot's layers, with a new socket, takes the place of the old one. It may be a snapshot
        of another image, in which others are at home, in another environment."""
        live = self._the(request["name"])
        if request["snapshot"] not in self._snapshots:
            raise FileNotFoundError(_no_snapshot(request["snapshot"]))
        wanted = Order(**request["order"])
        order = replace(live.order, user=wanted.user, agent=wanted.agent)
        stack, agent = self._snapshots[request["snapshot"]], os.dup(descriptors[0])
        stack.hold()

        def follow() -> None:
            self._launch(order, stack, agent, self._answering(request))
            stack.release()

        self._end(live, follow)

    def _new_layer(self) -> Layer:
        self._num_layers += 1
        return Layer.at(f"layers/{self._num_layers}")

    def _drop(self, request: Message, descriptors: list[int]) -> None:
        if (stack := self._snapshots.pop(request["snapshot"], None)) is not None:
            stack.release()
        self._answer(request["number"])

    def _diff(self, request: Message, descriptors: list[int]) -> None:
        live = self._the(request["name"])
        stack, made = live.stack, [*MADE, *live.order.mounts]
        archive, removed = descriptors  # which the child inherits
        most_bytes = live.order.disk_bytes + _MAX_NAMES_BYTES

        def compare() -> Message:
            layers = [live.open_disk(), *(each.open() for each in stack.layers)]
            # Files with holes hold more than the disk does, and what is written here is the host's memory.
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            try:
                with paused(live), open(archive, "wb") as output:
                    gone = aside.write_difference(layers, stack.image, output, stack.identity.inside, made)
            except OSError as error:
                if error.errno == errno.EFBIG:
                    return {"larger_than": most_bytes}
                raise
            with open(removed, "w") as output:
                json.dump(gone, output)
            return {}

        def done(answer: Message) -> None:
            if "problem" in answer:
                self._let_go_on(live)
            self._answer(request["number"], **answer)

        self._do_aside(compare, done)

    def _the(self, name: str) -> Live:
        live = self._live.get(name)
        if live is None or not live.is_ready or live.is_dead:
            raise ProcessLookupError("the sandbox has ended")
        return live

    def _let_go_on(self, live: Live) -> None:
        """What a child that failed may have left stopped. Of one that has ended meanwhile nothing is open any more."""
        if self._live.get(live.order.name) is not live:
            return
        try:
            resume(live)
        except OSError as error:
            live.problem = f"what was stopped for a while could not go on: {error}"
            live.kill()

    def _do_aside(self, work: Callable[[], Message], done: Callable[[Message], None]) -> None:
        """`done` hears of everything, also that there could be no child."""
        try:
            child = Aside.start(work)
        except OSError as error:
            done({"problem": str(error), **self._said_of(error)})
            return
        self._asides.add(child)

        def answered() -> None:
            self._unwatch(child.reader)
            self._asides.discard(child)
            done(child.answer())

        self._watch(child.reader, answered)


def _end() -> None:
    raise EOFError


def _no_snapshot(name: str) -> str:
    return f"there is no snapshot {name}; it may have been dropped"


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
