"""The text for training a model: a file, a folder, or the sources of the Python standard library."""

from __future__ import annotations

import codecs
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Folders of the standard library with other contents, or that some distributions leave out.
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}

PIECE_CHARACTERS = 2**16


class TextError(ValueError):
    """Error for a text that cannot be used; the message says what was given and what was expected."""


@dataclass(frozen=True)
class Corpus:
    """Text in pieces, ordered for the split into a training and a held-out part.

    Attributes:
        source: description for the user.
        pieces: consecutive pieces of files, each of whole lines.
        files: number of files read.
        skipped: number of files left out: binary, in another encoding, or not readable.
    """

    source: str
    pieces: list[str]
    files: int
    skipped: int = 0

    @property
    def characters(self) -> int:
        """Number of characters in all pieces."""
        return sum(map(len, self.pieces))


def read_corpus(path: Path | None, max_bytes: int) -> Corpus:
    """Read at most about ``max_bytes`` of text from ``path``, or from the standard library if it is None.

    Raises:
        TextError: there is nothing to read.
    """
    if path is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        return _read_folder(folder, max_bytes, ".py", NOT_LIBRARY, "the Python standard library")
    if path.is_dir():
        return _read_folder(path, max_bytes, "", set(), str(path))
    if not path.is_file():
        found = "something that is neither" if path.exists() else "no such path"
        raise TextError(f"got {str(path)!r}, expected a file or a folder ({found})")
    try:
        return Corpus(str(path), list(_pieces(_read_file(path, max_bytes))), 1)
    except OSError as error:
        raise TextError(f"got {str(path)!r}, expected a file that can be read ({error.strerror})") from error
    except UnicodeError as error:
        raise TextError(f"got {str(path)!r}, expected UTF-8 text, not a binary file or another encoding") from error


def _read_folder(folder: Path, max_bytes: int, suffix: str, left_out: set[str], source: str) -> Corpus:
    pieces: list[str] = []
    files = skipped = taken = 0
    # Shuffle, always in the same way: neighbours in a folder resemble each other, and the held-out part is the tail.
    for path in sorted(_files(folder, suffix, left_out), key=lambda path: _digest(path.relative_to(folder))):
        if taken >= max_bytes:
            break
        try:
            text = _read_file(path, max_bytes - taken)
        except (OSError, UnicodeError):
            skipped += 1
            continue
        pieces += _pieces(text)
        files += 1
        taken += len(text)
    if not pieces:
        raise TextError(f"got {str(folder)!r}, expected a folder with UTF-8 text ({skipped} other files in it)")
    return Corpus(source, pieces, files, skipped)


def _files(folder: Path, suffix: str, left_out: set[str]) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith(".")]
        for name in names:
            path = os.path.join(root, name)
            if name.endswith(suffix) and not name.startswith(".") and os.path.isfile(path):  # no pipes, no sockets
                yield Path(path)


def _read_file(path: Path, max_bytes: int) -> str:
    with path.open("rb") as file:
        data = file.read(max_bytes)
        complete = not file.read(1)
    if b"\0" in data:
        raise UnicodeError("binary data")
    # Use a decoder that may stop in the middle: the cut at max_bytes need not fall between two characters.
    return codecs.getincrementaldecoder("utf-8")().decode(data, final=complete)


def _pieces(text: str) -> Iterator[str]:
    """Split ``text`` into pieces of whole lines, so that the tokenizer works on several at a time."""
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= PIECE_CHARACTERS:
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.as_posix().encode("utf-8", "surrogateescape")).digest()
