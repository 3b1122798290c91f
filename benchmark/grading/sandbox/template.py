"""A warm process that forks a child per grading."""

import _signal
import _socket
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sysconfig
import time

from .isolation import (
    ADOPT_ORPHANS,
    DIE_WITH_PARENT,
    DUMPABLE,
    NEW_IPC,
    NEW_NET,
    NEW_PID,
    NO_NEW_PRIVILEGES,
    Landlock,
    become,
    drop_capabilities,
    fork,
    install_seccomp,
    libc,
    limit_resources,
    own_mounts,
    own_user_namespace,
    seccomp_program,
    works_in_child,
)
from .judge import run_judge
from .link import ProgramEnded
from .program import run_program

# Imported once by the template, so that a child that imports them pays nothing. Each makes every fork dearer,
# so only what programs import often.
WARM = "bisect collections.abc contextlib copy heapq itertools math re string typing".split()


class Template:
    """A warm process that forks single-use children on request."""

    def __init__(self, role, control, first_uid, base):
        self.role, self.control, self.first_uid, self.base = role, control, first_uid, base
        self.home = os.path.join(base, "runs")  # of the children, a folder each
        self.children, self.active = {}, []
        self.pid_namespace, self.landlock = None, Landlock()

    def enter(self):
        """Shuts this process into what the kernel grants; `self.active` says what that is."""
        self.enter_namespaces()
        library = sysconfig.get_path("stdlib")
        inside = own_mounts(self.base, library)
        if inside:
            self.active.append("mount namespace")
        os.mkdir(self.home, 0o711)
        self.drop = os.geteuid() == 0 and works_in_child(lambda: self.can_drop(inside or library))
        self.active += ["unprivileged user"] if self.drop else []
        libc.prctl(DUMPABLE, 0, 0, 0, 0)  # /proc/<pid> of judge and templates is closed to others
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if self.landlock.restrict(self.file_rules(library)):
            self.active.append("landlock")
        else:
            self.landlock.abi = 0
        self.enter_seccomp()
        limit_resources(processes=self.drop)

    def enter_namespaces(self):
        if own_user_namespace():
            self.active.append("user namespace")
        own_processes = libc.unshare(NEW_PID) == 0
        inner = os.fork()
        if (
            inner
        ):  # the outer half stays outside of the namespaces that the inner half opens, to clean up after it
            self.control.close()
            os.waitpid(inner, 0)
            remove(self.base)
            os._exit(0)
        libc.prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)  # the parent is the outer half
        os.setsid()
        if own_processes:
            self.pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            self.active.append("process namespace")
        else:
            libc.prctl(ADOPT_ORPHANS, 1, 0, 0, 0)  # so that they can be found and ended
        for flag, name in ((NEW_NET, "network namespace"), (NEW_IPC, "ipc namespace")):
            if libc.unshare(flag) == 0:
                self.active.append(name)

    def can_drop(self, library):
        """Whether another user can read the library, so that programs can run as one."""
        become(self.first_uid)
        return os.access(os.path.join(library, "os.py"), os.R_OK)

    def file_rules(self, library):
        """What programs may read and write: the library without what others have installed, their own
        folders."""
        places = (
            library,
            os.path.join(self.base, "library"),
        )  # seen from outside and from inside, see `own_mounts`
        names = [
            name for name in os.listdir(library) if name not in ("site-packages", "dist-packages", "test")
        ]
        readable = [os.path.join(place, name) for place in places for name in names]
        readable += ["/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo", "/dev/urandom", "/dev/zero"]
        rules = [(path, Landlock.READ) for path in readable] + [(place, Landlock.LIST) for place in places]
        return [*rules, (self.home, None), ("/dev/null", None)]

    def enter_seccomp(self):
        # Where descendants cannot be both counted and ended with certainty, a program may not fork.
        may_fork = self.drop and self.pid_namespace is not None
        self.filter = seccomp_program(may_fork)
        if self.filter and works_in_child(lambda: install_seccomp(self.filter)):
            self.active.append("seccomp")
            if may_fork:
                install_seccomp(self.filter)  # once, for all children
                self.filter = None
        else:
            self.filter = None
            if self.pid_namespace is None:
                raise OSError(
                    "the kernel grants neither namespaces nor seccomp: a program could end the grader, so "
                    "none is run"
                )

    def serve(self):
        """Forks on request until the control socket closes. Requests: {"fork": id, "slot", "memory", "cpu"}
        with a socket, {"kill": id}, {"clock": id}."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        os.set_blocking(reader, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self.report({"isolation": self.active})
        while True:
            ready, _, _ = select.select([self.control, reader], [], [])
            if reader in ready:
                try:
                    os.read(reader, 4096)
                except BlockingIOError:
                    pass
                self.reap()
            if self.control in ready:
                data, descriptors, _, _ = socket.recv_fds(self.control, 1 << 16, 8)
                if not data:
                    return
                request = json.loads(data)
                if "fork" in request:
                    self.fork(request, descriptors)
                elif request.get("kill") in self.children:
                    self.kill(self.children[request["kill"]][0])
                elif "clock" in request:
                    pid = self.children.get(request["clock"], (None,))[0]
                    # The number of another process's CPU-time clock is made as clock_getcpuclockid(3) makes
                    # it.
                    seconds = time.clock_gettime(~pid << 3 | 2) if pid else 0.0
                    self.report({"id": request["clock"], "clock": seconds, "for": request.get("for")})
                for fd in descriptors:
                    os.close(fd)

    def report(self, message):
        self.control.send(json.dumps(message).encode())

    def fork(self, request, descriptors):
        folder = os.path.join(self.home, f"{request['slot']}")
        uid = self.first_uid + request["slot"]
        try:
            os.mkdir(folder, 0o700)
            if self.drop:
                os.chown(folder, uid, uid)
            if self.pid_namespace is not None:
                if libc.setns(self.pid_namespace, NEW_PID) or libc.unshare(NEW_PID):
                    raise OSError(ctypes.get_errno(), "no process namespace")
            pid = fork()
            if pid < 0:
                raise OSError("fork failed")
        except OSError as error:
            self.report({"id": request["fork"], "error": f"{self.role} process did not start: {error}"})
            return
        if pid == 0:
            code = 1
            try:
                self.child(request, descriptors[0], folder, uid)
                code = 0
            finally:
                os._exit(code)
        self.children[request["fork"]] = (pid, folder)

    def child(self, request, descriptor, folder, uid):
        # Little is done here, and in few lines: what can be inherited was set up in the template, and every
        # page that is written is copied.
        _signal.set_wakeup_fd(-1)
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
        os.setsid()
        os.dup2(descriptor, 3)
        os.closerange(4, 1024)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
        if request["cpu"]:
            resource.setrlimit(resource.RLIMIT_CPU, (request["cpu"], request["cpu"]))
        if self.drop:
            become(uid)
        else:
            drop_capabilities()
            if self.landlock.abi:
                self.landlock.restrict([("/", Landlock.READ), ("/dev/null", None), (folder, None)])
            libc.prctl(DUMPABLE, 0, 0, 0, 0)  # a change of user has done it already
        if self.filter and not install_seccomp(self.filter):
            raise OSError("no seccomp")
        try:
            if self.role == "program":
                run_program(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, 3))
            else:
                run_judge(socket.socket(fileno=3))
        except ProgramEnded:
            pass

    def kill(self, pid):
        """Ends a child, and its group where no namespace ends its descendants."""
        for end in (os.kill,) if self.pid_namespace is not None else (os.kill, os.killpg):
            try:
                end(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass

    def reap(self):
        known = {pid: name for name, (pid, _) in self.children.items()}
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid not in known or known[pid] not in self.children:
                continue  # an orphan that was adopted
            if self.pid_namespace is None:
                self.kill(pid)  # the rest of its group
                self.end_orphans()
            name = known[pid]
            _, folder = self.children.pop(name)
            try:
                remove(folder)
            except OSError:
                # What resists is put aside, so that the slot's name is free again; it goes when the template
                # goes.
                os.rename(folder, f"{folder}.{os.urandom(8).hex()}")
            seconds = usage.ru_utime + usage.ru_stime
            self.report({"id": name, "status": os.waitstatus_to_exitcode(status), "cpu": seconds})

    def end_orphans(self):
        """Without a process namespace a descendant may have left its group: as adopted children they are
        found here."""
        try:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                adopted = set(map(int, file.read().split())) - {pid for pid, _ in self.children.values()}
        except OSError:
            return
        for pid in adopted:
            self.kill(pid)

    def close(self):
        for pid, _ in self.children.values():
            self.kill(pid)


def remove(folder):
    """Deletes a tree that a program may have made very deep or closed to others: level by level, without
    recursion or long paths."""
    count = 0
    os.chmod(folder, 0o700)
    while names := os.listdir(folder):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.isdir(path) or os.path.islink(path):
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            for inner in os.listdir(path):  # its children move up one level, so that it is empty
                inner_path = os.path.join(path, inner)
                if os.path.isdir(inner_path) and not os.path.islink(inner_path):
                    os.chmod(inner_path, 0o700)  # moving a folder rewrites its link to the parent
                    count += 1
                    os.rename(inner_path, os.path.join(folder, f".{count}.{os.urandom(4).hex()}"))
                else:
                    os.unlink(inner_path)
            os.rmdir(path)
    os.rmdir(folder)


def main(role, control_fd, first_uid, base):
    control = socket.socket(fileno=int(control_fd))
    for name in WARM:
        importlib.import_module(name)
    template = Template(role, control, int(first_uid), base)
    try:
        template.enter()
    except OSError as error:
        control.send(json.dumps({"error": f"the {role} template cannot start: {error}"}).encode())
        return
    os.dup2(1, 2)  # the owner reads standard error only until here
    try:
        gc.disable()
        gc.collect()
        gc.freeze()  # children share these pages; collecting them would copy every one
        template.serve()
    except OSError:
        pass  # the owner is gone
    finally:
        template.close()
