"""Cache files, which hold results that took long to find or to make, and can be made again.

A file may be damaged, belong to another user, or not be a regular file, and a folder may be read-only or on a full
disk: none of this may stop a training run, hang it, or make it run code planted by others. So a file is moved into
place when complete, ends with a digest of its content, and is used only if nobody but its reader (or root) can have
written it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import warnings
from contextlib import suppress
from pathlib import Path

#: A sealed file ends with this, and a digest of the file's name and of all before it. Readers of ELF or NumPy's format
#: stop before.
_SEAL = b"\ncce seal 1 "
_TAIL = len(_SEAL) + hashlib.sha256().digest_size
_MOST = 2**31  # bytes of the largest possible cache file

# Do not wait for a FIFO or follow a link. Windows has neither flag, but distinguishes text from bytes.
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_BINARY"))

_warned: set[str] = set()


class Unusable(Exception):
    """Reason why a file or folder cannot be used."""


class Cache:
    """Files that a process keeps for later ones. Unusable ones cause one warning per process, and are made anew.

    Args:
        name: name of one such file in a warning, "cubin of the numba backend".
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, path: Path) -> bytes | None:
        """Return the content given to :meth:`put`; None if there is no file, or it cannot be used."""
        try:
            return _opened(path.name, read(path))
        except FileNotFoundError:
            return None
        except (OSError, Unusable) as error:
            warn_once(self.name, f"{self.name} {path} is not used ({reason(error)}), and is made anew")
            return None

    def put(self, path: Path, content: bytes) -> None:
        """Write a sealed file, replacing an existing one; the folder is made if need be."""
        self.put_plain(path, sealed(path.name, content))

    def put_plain(self, path: Path, content: bytes) -> None:
        """Write a file without a seal, which is never read by :meth:`get`."""
        try:
            make_folder(path.parent)
            write(path, content)
        except (OSError, Unusable) as error:
            warn_once(self.name, f"{self.name} {path} is not kept ({reason(error)}), and is made anew next time")


def warn_once(cache: str, message: str) -> None:
    """Warn of the first fault of a cache only: if the disk is at fault, every file would give the same warning."""
    if cache not in _warned:
        _warned.add(cache)
        warnings.warn(f"cce: {message}", RuntimeWarning, stacklevel=4)


def sealed(name: str, content: bytes) -> bytes:
    """Bytes of a file of this name: the content, and a seal that shows whether it is complete."""
    return content + _SEAL + _digest(name, content)


def _opened(name: str, data: bytes) -> bytes:
    content, tail = data[:-_TAIL], data[-_TAIL:]
    if tail != _SEAL + _digest(name, content):
        raise Unusable("it is damaged, or none of ours: its digest is not that of its content")
    return content


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(os.fsencode(name) + b"\0" + content).digest()


def read(path: Path) -> bytes:
    """Read a regular file that only its owner, this process's user or root, can have written.

    Raises:
        Unusable: it is not a regular file, or others could have put it there.
        OSError: it cannot be read; FileNotFoundError if there is none.
    """
    descriptor = os.open(path, _READ)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Unusable("it is no regular file")
        if found.st_size > _MOST:
            raise Unusable(f"it has {found.st_size} bytes, more than any of ours")
        _check_owner("it", found)
        check_folder(path.parent)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def check_folder(folder: Path) -> None:
    """Raise Unusable if others could replace files in the folder by their own; OSError if it does not exist."""
    _check_owner(f"its folder {folder}", os.stat(folder))


def _check_owner(what: str, found: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):  # Windows, which has other permissions
        return
    if found.st_uid not in (0, os.geteuid()):
        raise Unusable(f"{what} belongs to user {found.st_uid}, expected {os.geteuid()} or root")
    # In a folder like /tmp others can add files, but cannot replace ours.
    kept = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not kept:
        raise Unusable(f"others may write to {what}, mode {stat.S_IMODE(found.st_mode):04o}: chmod go-w")


def make_folder(folder: Path) -> None:
    """Make a folder that others may read and only its owner may change; an existing one is checked.

    Raises:
        OSError, Unusable: it cannot be made or used.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_folder(folder)


def write(path: Path, content: bytes) -> None:
    """Write a file under another name first, so that nobody reads an incomplete one; the folder must exist.

    Raises:
        OSError: it cannot be written; nothing is then left behind.
    """
    # A different name for every writer, and none that a reader looks for.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(os.open(partial, _WRITE, 0o644), "wb") as file:
            file.write(content)
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def check_writable(folder: Path) -> None:
    """Make a folder if need be, and a test file in it: permission bits mean nothing for root or on a read-only disk.

    Raises:
        OSError, Unusable: the folder or the file cannot be made.
    """
    make_folder(folder)
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        write(probe, b"")
    finally:
        _remove(probe)


def _remove(path: Path) -> None:
    with suppress(OSError):  # an earlier error already gives the reason
        path.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """Describe an error as part of a sentence."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"
