"""Whose turn it is among the grading processes of one user on one machine: any number of them run programs
side by side, or one of them runs one program alone."""

import fcntl
import os
import sys
import tempfile
import time

FOLDER = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()  # one for all, whatever TMPDIR is
PATH = f"{FOLDER}/pfppo-grading-{os.geteuid()}.lock"  # empty, and it stays: others may be about to lock it
PATIENCE = 300  # seconds to wait for the others; who is stopped while it has the lock must not stop all
PAUSE = 0.02  # seconds after a program alone, in which others find the door open
DOOR, ROOM = 0, 1  # bytes of the file


class Turns:
    """Locks on two bytes of a file. They end with their process and are not inherited by its children.

    ROOM is held by whoever runs programs: shared, or exclusively by one who is alone. DOOR is passed to start
    a program. Who wants to be alone closes it first, so that those inside come to an end and no others
    follow.
    """

    def __init__(self):
        self.file = os.open(PATH, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self.inside = self.alone = self.ignored = False
        self.waiting_since = None

    def close(self):
        os.close(self.file)

    def enter(self, alone):
        """Whether a program may start now; then the room is held until `leave`. Never waits: call again."""
        kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        admitted = self.lock(DOOR, kind)
        if admitted and (alone or not self.inside):
            admitted = self.lock(ROOM, kind)
        if not alone:
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, DOOR)
        if admitted:
            self.waiting_since = None
        admitted = admitted or self.out_of_patience()
        self.inside, self.alone = self.inside or admitted, alone
        return admitted

    def leave(self):
        fcntl.lockf(self.file, fcntl.LOCK_UN, 2, DOOR)
        if self.alone:
            time.sleep(PAUSE)
        self.inside = self.alone = False

    def lock(self, byte, kind):
        try:
            fcntl.lockf(self.file, kind | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # POSIX allows either
            return False
        return True

    def out_of_patience(self):
        self.waiting_since = self.waiting_since or time.monotonic()
        if not self.ignored and time.monotonic() - self.waiting_since > PATIENCE:
            self.ignored = True
            print(f"grading: {PATH} is held for {PATIENCE} s by another process: ignored", file=sys.stderr)
        return self.ignored
