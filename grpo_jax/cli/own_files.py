"""Files of a run directory that stay open: plain ones, no links, and a lock."""

from __future__ import annotations

import os
import stat
import sys
import warnings
from pathlib import Path
from typing import BinaryIO

from grpo_jax.files import atomically, open_plain


def open_rows(path: Path, n_bytes: int) -> BinaryIO:
    """Opens a file of rows to add some behind its first ``n_bytes``; what follows them is dropped.

    The file becomes a new one: where it was a link, or has other names, those keep what they hold.
    """
    with atomically(path) as file:
        if n_bytes:
            with open_plain(path, sys.maxsize) as old:
                for start in range(0, n_bytes, 1 << 20):
                    file.write(old.read(min(1 << 20, n_bytes - start)))
    return open_own(path, os.O_WRONLY | os.O_APPEND)


def check_own(path: Path) -> None:
    """Refuses a file or directory of a run that is a link: what is written into it would lie elsewhere."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link; links in a run directory are not followed: remove it")


def open_own(path: Path, flags: int) -> BinaryIO:
    """Opens a file that may be written to, unbuffered, where it is a plain file and no link."""
    check_own(path)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a plain file: remove it")
    return os.fdopen(handle, "r+b" if flags & os.O_RDWR else "ab", buffering=0)


def lock(file: BinaryIO, path: Path) -> None:
    """Takes a lock that the system gives back when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = file.read(20).decode(errors="replace")
        raise ValueError(
            f"directory={path} is in use: process {owner or '?'} trains there; wait for it, or stop it (Ctrl-C or"
            " SIGTERM: it saves)"
        ) from None
    except OSError as error:
        warnings.warn(f"{path} cannot be locked ({error.strerror}): do not train there twice", stacklevel=4)
        return
    file.truncate(0)
    file.write(str(os.getpid()).encode())
