"""What the kernel grants to keep a program in: namespaces, mounts, landlock, seccomp, a user without
privileges."""

import ctypes
import os
import resource
import struct
import sys

FILE_BYTES = 16 << 20  # the largest file that a program may write
PROCESSES = 8  # processes and threads of a program

NEW_NS, NEW_UTS, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
PRIVATE, RECURSIVE, BIND, READ_ONLY, NO_SUID, NO_DEVICES = 0x40000, 0x4000, 0x1000, 1, 2, 4  # of mount(2)
DIE_WITH_PARENT, DUMPABLE, SECCOMP, ADOPT_ORPHANS, NO_NEW_PRIVILEGES = 1, 4, 22, 36, 38  # of prctl(2)
libc = ctypes.CDLL(None, use_errno=True)
# Without os.fork's handlers, which rewrite much memory in the child for threads that a template does not
# have.
fork = ctypes.PyDLL(None).fork

# System calls that a program has no business with, by number (x86_64, aarch64); None where the machine has
# none.
DENIED = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "execve": (59, 221),
    "execveat": (322, 281),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "personality": (135, 92),
    "iopl": (172, None),
    "ioperm": (173, None),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
}
SIGNALS = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}
FORKS = {"fork": (57, None), "vfork": (58, None)}
UNSHARE, SETNS, CLONE, CLONE3 = (272, 97), (308, 268), (56, 220), (435, 435)
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, audit architecture


def seccomp_program(allow_fork):
    """The filter as bytes of `struct sock_filter`, or None on a machine whose numbers are not listed.

    allow_fork: for a template whose children have a process namespace and a user of their own. It passes the
    two calls by which the template makes such namespaces (of its children, who lack the privilege, the kernel
    refuses them). Without it, no process can be made or signalled at all.
    """
    if os.uname().machine not in MACHINES or sys.maxsize < 1 << 32:
        return None
    column, architecture = MACHINES[os.uname().machine]
    load, jump_equal, jump_above, jump_any, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, missing = 0x7FFF0000, 0x80000000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
    rules = [(load, 0, 0, 4), (jump_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:
        rules += [(jump_above, 0, 1, 0x40000000), (give, 0, 0, refuse)]  # the x32 numbering of the same calls
    refused = (
        dict(DENIED) if allow_fork else {**DENIED, **SIGNALS, **FORKS, "unshare": UNSHARE, "setns": SETNS}
    )
    for numbers in refused.values():
        if numbers[column] is not None:
            rules += [(jump_equal, 0, 1, numbers[column]), (give, 0, 0, refuse)]
    # The flags of clone3 lie in memory, out of a filter's sight: libc falls back to clone.
    rules += [(jump_equal, 0, 1, CLONE3[column]), (give, 0, 0, missing)]
    namespaces = NEW_NS | NEW_UTS | NEW_IPC | NEW_USER | NEW_PID | NEW_NET | 0x02000000 | 0x80
    for numbers, flags in ((UNSHARE, 16), (SETNS, 24)) if allow_fork else ():  # the place of the argument
        only_processes = [
            (load, 0, 0, flags),
            (jump_equal, 1, 0, NEW_PID),
            (give, 0, 0, refuse),
            (load, 0, 0, 0),
        ]
        rules += [(jump_equal, 0, 3, numbers[column]), *only_processes]
    tail = [(load, 0, 0, 16), (jump_any, 0, 1, namespaces & 0xFFFFFFFF), (give, 0, 0, refuse)]
    if not allow_fork:
        tail += [(jump_any, 1, 0, 0x10000), (give, 0, 0, refuse)]  # CLONE_THREAD: threads yes, processes no
    rules += [(jump_equal, 0, len(tail), CLONE[column]), *tail, (give, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


def install_seccomp(program):
    """Returns whether the kernel took the filter."""
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    return libc.prctl(SECCOMP, 2, ctypes.c_char_p(header), 0, 0) == 0


class Landlock:
    """File access rules that need no privilege: read the standard library, write the own temporary directory,
    nothing else."""

    LIST = 1 << 3  # a directory
    READ = 1 << 2 | LIST  # a file

    def __init__(self):
        self.abi = libc.syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint(1))

    def restrict(self, rules):
        """rules: (path, access or None for everything). Returns whether they are in force."""
        if self.abi < 1:
            return False
        files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(self.abi, 16)) - 1
        size = (
            8 if self.abi < 4 else 16 if self.abi < 6 else 24
        )  # files; network; signals and abstract sockets
        attributes = struct.pack("QQQ", files, 3, 3)[:size]
        ruleset = libc.syscall(
            444, ctypes.c_char_p(attributes), ctypes.c_size_t(len(attributes)), ctypes.c_uint(0)
        )
        if ruleset < 0:
            return False
        for path, access in rules:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            access = files if access is None else access
            if not os.path.isdir(path):
                access &= 1 << 1 | 1 << 2 | (1 << 14 if self.abi >= 3 else 0)
            rule = ctypes.c_char_p(struct.pack("=Qi", access, fd))
            libc.syscall(445, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint(0))
            os.close(fd)
        done = libc.syscall(446, ctypes.c_int(ruleset), ctypes.c_uint(0)) == 0
        os.close(ruleset)
        return done


def drop_capabilities():
    header = struct.pack("Ii", 0x20080522, 0)
    return libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(b"\0" * 24)) == 0


def move_packages(old, new):
    """Packages that are imported already look for their modules below `new` instead of `old`."""
    for module in list(sys.modules.values()):
        places = getattr(module, "__path__", None)
        if isinstance(places, list):
            places[:] = [
                new + place[len(old) :] if place.startswith(old + os.sep) else place for place in places
            ]


def works_in_child(attempt):
    """Whether `attempt` works, tried in a child because it cannot be undone."""
    pid = os.fork()
    if pid == 0:
        done = False
        try:
            done = attempt()
        finally:
            os._exit(0 if done else 1)
    return os.waitpid(pid, 0)[1] == 0


def become(user):
    """This process becomes a user and group without other groups."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def own_user_namespace():
    """A namespace in which this user, who has no privilege, may make the others. Returns whether it is
    there."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 or libc.unshare(NEW_USER) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def own_mounts(base, library):
    """A file system in memory at `base`, which ends with the template, and an empty /proc. Returns where the
    library is seen then, or None without such mounts."""
    if libc.unshare(NEW_NS) != 0 or libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None) != 0:
        return None
    options = b"size=256m,nr_inodes=20000,mode=0711"
    if libc.mount(b"tmpfs", base.encode(), b"tmpfs", NO_SUID | NO_DEVICES, options) != 0:
        return None
    # The interpreter may live where only its owner may look (/root), so the library is shown again inside.
    inside = os.path.join(base, "library")
    os.mkdir(inside)
    if libc.mount(library.encode(), inside.encode(), None, BIND | RECURSIVE, None) == 0:
        sys.path[:] = [inside, os.path.join(inside, "lib-dynload")]
        move_packages(library, inside)
    else:
        inside = library
    libc.mount(b"tmpfs", b"/proc", b"tmpfs", READ_ONLY | NO_SUID | NO_DEVICES, b"size=4k")
    return inside


def limit_resources(processes):
    """Limits for this process and its children; processes: whether they are counted per user, hence per
    program."""
    limits = {"FSIZE": FILE_BYTES, "NOFILE": 64, "CORE": 0, "STACK": 64 << 20}
    if processes:
        limits["NPROC"] = PROCESSES
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, hard if name == "STACK" else value))
    os.umask(0o077)
