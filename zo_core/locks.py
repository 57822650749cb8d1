"""A lock on an open file, which keeps a second writer out; the system frees it when the process ends, however it ends."""

from contextlib import suppress
from typing import IO

try:
    import fcntl
except ImportError:  # a system without such locks: there a second writer is not noticed
    fcntl = None  # type: ignore[assignment]


def lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed or ``unlock`` is called. False if somebody has locked it, here or in another process.

    A file system that has no locks counts as one where the file is free.
    """
    try:
        if fcntl is not None:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        pass
    return True


def unlock(file: IO[bytes]) -> None:
    """Free the lock. Closing the file does not do it where a child process was forked, which has the file open too."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)
