"""Files: written all or not at all, under a seal; read only where they are what they seem, and not too large.

A sealed file is one line, ``grpo-jax KIND VERSION SIZE SHA256``, and a payload of SIZE bytes. The checksum covers the line
before it, too: no bit of the file can change unnoticed. It is no signature: who writes a file on purpose can seal it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO


class UnsealedWarning(UserWarning):
    """A file is older than checksums: damage of it is not noticed."""


_MAGIC = b"grpo-jax "
_SEAL = re.compile(rb"grpo-jax ([a-z-]{1,32}) ([0-9]{1,9}) ([0-9]{1,15}) ([0-9a-f]{64})\n")
_LONGEST_SEAL = 160
UNSEALED = 0
"""The version of a file that was written before files were sealed."""


def check_regular(path: Path, max_bytes: int) -> None:
    """Refuses what is no plain file, and what is too large, before a byte of it is read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a directory, a pipe, a device, a socket; or more than ``max_bytes``.
    """
    _check(path, os.stat(path), max_bytes)


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """All of a plain file of at most ``max_bytes``; raises as :func:`check_regular`."""
    with open_plain(path, max_bytes) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def write_sealed(path: Path, kind: str, version: int, payload: bytes) -> None:
    """Writes a sealed file; see :func:`write_atomically`.

    Args:
      path: the file.
      kind: what it holds: lower-case letters and "-".
      version: of the format, at least 1.
      payload: what it holds.
    """
    write_atomically(path, seal(kind, version, payload))


def read_sealed(
    path: Path, kind: str, versions: Collection[int], max_bytes: int, *, unsealed: bool = False
) -> tuple[int, bytes]:
    """Reads a sealed file and verifies it.

    Args:
      path: the file.
      kind: that it must be of.
      versions: that can be read.
      max_bytes: of the payload.
      unsealed: whether a file without a seal is handed out, too, as version ``UNSEALED``.

    Returns:
      Version and payload.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no plain file, too large, of another kind or version, or damaged; says which.
    """
    with open_plain(path, max_bytes + _LONGEST_SEAL) as file:
        # A large file without a seal is not read to its end.
        content = file.read(_LONGEST_SEAL)
        if unsealed or _SEAL.match(content):
            content += file.read(os.fstat(file.fileno()).st_size)  # as much memory is taken before
    return unseal(path, content, kind, versions, unsealed=unsealed)


def is_sealed(path: Path) -> bool:
    """Whether a plain file begins with a seal; no more than that is read."""
    with open_plain(path, sys.maxsize) as file:
        return _SEAL.match(file.read(_LONGEST_SEAL)) is not None


def seal(kind: str, version: int, payload: bytes) -> bytes:
    """A payload behind its seal."""
    head = f"grpo-jax {kind} {version} {len(payload)}".encode()
    content = head + b" " + _digest(head, payload) + b"\n" + payload
    assert _SEAL.match(content), f"kind={kind!r} or version={version!r} makes no seal"
    return content


def unseal(
    path: Path, content: bytes, kind: str, versions: Collection[int], *, unsealed: bool = False
) -> tuple[int, bytes]:
    """Version and payload of a sealed file's ``content``; ``path`` only names it. Raises as :func:`read_sealed`."""
    found = _SEAL.match(content[:_LONGEST_SEAL])
    if found is None:
        if content.startswith(_MAGIC):
            raise ValueError(f"{path} is damaged: its first line is no seal")
        if unsealed:
            return UNSEALED, content
        raise ValueError(f"{path} is not a grpo-jax {kind}, or its first line is damaged")
    written_kind, version, size, digest = found.groups()
    payload = content[found.end() :]
    if len(payload) != int(size):
        raise ValueError(f"{path} is damaged: {len(payload)} bytes of {int(size)} are there")
    if _digest(content[: found.start(4) - 1], payload) != digest:
        raise ValueError(f"{path} is damaged: its checksum does not fit what it holds")
    if written_kind.decode() != kind:
        raise ValueError(f"{path} is a grpo-jax {written_kind.decode()}, not a grpo-jax {kind}")
    if int(version) not in versions:
        known = ", ".join(map(str, versions))
        raise ValueError(
            f"{path} has version {int(version)} of the {kind} format, which this grpo-jax does not know"
            f" (it knows {known}): it was written by a newer one"
        )
    return int(version), payload


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file at once; see :func:`atomically`."""
    with atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes ``path`` at the end: at any moment either the old or the new one is there, whole.

    A link is replaced, not followed. Nothing is left behind where it fails.

    Raises:
      OSError: names the file.
    """
    handle, temporary = -1, ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            # mkstemp keeps a file to its owner; a run is as readable as any other file would be.
            umask = os.umask(0)
            os.umask(umask)
            if hasattr(os, "fchmod"):
                os.fchmod(handle, 0o666 & ~umask)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise type(error)(
                error.errno, f"cannot write it, what was there is kept: {reason}", str(path)
            ) from error
        raise
    with contextlib.suppress(OSError):  # the name, too, outlives a power cut, where the system knows how
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def remove_temporaries(path: Path) -> None:
    """Removes what killed processes left of :func:`write_atomically`; nobody else may be writing ``path`` now."""
    # Until 0.1 there was no ".tmp" at the end.
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}(\.tmp)?")
    with contextlib.suppress(FileNotFoundError), os.scandir(path.parent) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)


def _check(path: Path, status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"{path} is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, not a plain file")
    if status.st_size > max_bytes:
        raise ValueError(f"{path} has {status.st_size:,} bytes, more than the {max_bytes:,} that it can need")


def open_plain(path: Path, max_bytes: int) -> BinaryIO:
    """Opens a plain file of at most ``max_bytes`` to read; raises as :func:`check_regular`."""
    check_regular(path, max_bytes)
    # A pipe must not wait for its writer, where what lies there has changed since it was checked.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(handle, "rb")
    try:
        _check(path, os.fstat(handle), max_bytes)
    except ValueError:
        file.close()
        raise
    return file


def _digest(head: bytes, payload: bytes) -> bytes:
    digest = hashlib.sha256(head + b"\n")
    digest.update(payload)
    return digest.hexdigest().encode()
