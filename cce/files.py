"""Files of caches: what took long to find or to make, and can be made again.

A file may be damaged, be somebody else's, or be no file at all, and a folder read-only or on a full disk: none of that
may stop a training run, hang it, or have it run code that others have put there. So a file is moved to its place when
complete, ends in a digest of its content, and counts only if nobody but its reader (or root) can have written it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import warnings
from contextlib import suppress
from pathlib import Path

#: At the end of a sealed file: this, and the digest of the file's name and of all before it. What reads ELF or NumPy's
#: format stops before.
_SEAL = b"\ncce seal 1 "
_TAIL = len(_SEAL) + hashlib.sha256().digest_size
_MOST = 2**31  # bytes of a file that can be one of ours

# No FIFO is waited for, and no link followed. Windows has neither flag, but tells text from bytes.
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_BINARY"))

_warned: set[str] = set()


class Unusable(Exception):
    """Why a file or folder cannot be used."""


class Cache:
    """Files that a process keeps for later ones. What cannot be used is warned of once a process, and made anew.

    Args:
        name: what a warning calls one of them, "cubin of the numba backend".
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def get(self, path: Path) -> bytes | None:
        """The content that :meth:`put` was given; None if there is none, or none that can be used."""
        try:
            return _opened(path.name, read(path))
        except FileNotFoundError:
            return None
        except (OSError, Unusable) as error:
            warn_once(self.name, f"{self.name} {path} is not used ({reason(error)}), and is made anew")
            return None

    def put(self, path: Path, content: bytes) -> None:
        """Writes a sealed file, in place of what was there; the folder is made if need be."""
        self.put_plain(path, sealed(path.name, content))

    def put_plain(self, path: Path, content: bytes) -> None:
        """The same for a file that is never read by :meth:`get`."""
        try:
            make_folder(path.parent)
            write(path, content)
        except (OSError, Unusable) as error:
            warn_once(self.name, f"{self.name} {path} is not kept ({reason(error)}), and is made anew next time")


def warn_once(cache: str, message: str) -> None:
    """The first thing that is wrong with a cache: where that is a disk, every file of it would say the same."""
    if cache not in _warned:
        _warned.add(cache)
        warnings.warn(f"cce: {message}", RuntimeWarning, stacklevel=4)


def sealed(name: str, content: bytes) -> bytes:
    """The bytes of a file of this name: the content, and what tells whether it is whole."""
    return content + _SEAL + _digest(name, content)


def _opened(name: str, data: bytes) -> bytes:
    content, tail = data[:-_TAIL], data[-_TAIL:]
    if tail != _SEAL + _digest(name, content):
        raise Unusable("it is damaged, or none of ours: its digest is not that of its content")
    return content


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(os.fsencode(name) + b"\0" + content).digest()


def read(path: Path) -> bytes:
    """The bytes of a regular file that only its owner, this process's user or root, can have written.

    Raises:
        Unusable: it is another kind of file, or others could have put it there.
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
    """Raises Unusable if others could put files of their own in the place of ours; OSError if it is not there."""
    _check_owner(f"its folder {folder}", os.stat(folder))


def _check_owner(what: str, found: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):  # Windows, whose permissions are not these
        return
    if found.st_uid not in (0, os.geteuid()):
        raise Unusable(f"{what} belongs to user {found.st_uid}, expected {os.geteuid()} or root")
    # In a folder like /tmp others can add files, but not replace ours.
    kept = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not kept:
        raise Unusable(f"others may write to {what}, mode {stat.S_IMODE(found.st_mode):04o}: chmod go-w")


def make_folder(folder: Path) -> None:
    """Makes a folder that others may read and only its owner may change; one that is there is checked.

    Raises:
        OSError, Unusable: it cannot be made, or not be used.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_folder(folder)


def write(path: Path, content: bytes) -> None:
    """Writes under another name first, so that nobody ever reads half of a file; the folder is there.

    Raises:
        OSError: it cannot be written. Nothing is left behind then.
    """
    # A name of its own for every writer, and not one that a reader looks for.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with open(os.open(partial, _WRITE, 0o644), "wb") as file:
            file.write(content)
        partial.replace(path)
    except BaseException:
        _remove(partial)
        raise


def check_writable(folder: Path) -> None:
    """Makes a folder if need be, and a file in it: permission bits say nothing to root or on a read-only disk.

    Raises:
        OSError, Unusable: it cannot be done.
    """
    make_folder(folder)
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        write(probe, b"")
    finally:
        _remove(probe)


def _remove(path: Path) -> None:
    with suppress(OSError):  # where there is an error already, that one says why
        path.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """An error as a part of a sentence."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"
