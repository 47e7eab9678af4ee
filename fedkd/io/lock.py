"""One writer per folder: two processes that go on with one run would both write into it.

The lock is the operating system's, on a file that stays. It ends with the process that holds it,
however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK = ".lock"


class Busy(RuntimeError):
    """Another process writes into the folder."""


class Lock:
    """Held by the one process that writes into a folder; entered again, it is held longer.

    Args:
        folder: The folder; it has to be there when the lock is entered.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._depth = 0
        self._descriptor: int | None = None
        self._guard = threading.Lock()

    def __enter__(self) -> Lock:
        with self._guard:
            if self._depth == 0:
                self._descriptor = self._take()
            self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._depth -= 1
            if self._depth == 0 and self._descriptor is not None:
                # A child between fork and exec has the file open too; closing would not unlock it.
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
                os.close(self._descriptor)
                self._descriptor = None

    def _take(self) -> int | None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise Busy(
                f"{self.path.parent}: {holder or 'another process'} is at work on it; wait until "
                "it has ended, or end it"
            ) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            logger.warning(
                "%s: the file system has no locks (%s); two processes that go on with one run "
                "are not distinguished", self.path.parent, error.strerror,
            )  # fmt: skip
            return None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        return descriptor
