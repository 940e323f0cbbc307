"""Files of caches: whole, ours, and no reason to stop where they cannot be had."""

from __future__ import annotations

import os
import signal
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cce import files
from cce.files import Cache, Unusable

resource = pytest.importorskip("resource")  # and the other calls of Unix

CONTENT = b"\x7fELF" + bytes(range(256))


pytestmark = pytest.mark.usefixtures("nothing_warned_of")


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A read that waits for a writer fails the test, instead of hanging it."""

    def stuck(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def cache() -> Cache:
    return Cache("file of a test")


@pytest.fixture
def path(tmp_path: Path, cache: Cache) -> Path:
    """A good file."""
    path = tmp_path / "folder" / "a.cubin"
    cache.put(path, CONTENT)
    return path


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files end after 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("content", [b"", b"x", CONTENT, files.sealed("a.cubin", CONTENT)], ids=range(4))
def test_round_trip(path: Path, cache: Cache, content: bytes) -> None:
    cache.put(path, content)
    assert cache.get(path) == content
    assert path.read_bytes().startswith(content), "what reads the format itself finds it"
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_nothing_is_no_fault(tmp_path: Path, cache: Cache) -> None:
    assert cache.get(tmp_path / "none") is None
    assert cache.get(tmp_path / "no folder" / "none") is None


def test_modes(tmp_path: Path, cache: Cache) -> None:
    """Others may read a cache that is shared, and nobody else may write to it; a stricter umask holds."""
    for mask, of_folder, of_file in ((0o002, 0o755, 0o644), (0o022, 0o755, 0o644), (0o077, 0o700, 0o600)):
        before = os.umask(mask)
        try:
            path = tmp_path / f"{mask:o}" / "a"
            cache.put(path, CONTENT)
        finally:
            os.umask(before)
        found = [stat.S_IMODE(x.stat().st_mode) for x in (path.parent, path)]
        assert found == [of_folder, of_file]
        assert cache.get(path) == CONTENT


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)


def linked(path: Path) -> None:
    other = path.with_name("other")
    path.rename(other)
    path.symlink_to(other)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def renamed(path: Path) -> None:
    """Another kernel's file under this name."""
    path.write_bytes(files.sealed("b.cubin", CONTENT))


def sparse(path: Path) -> None:
    """A terabyte of zeros."""
    os.truncate(path, 2**40)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's file from now on; only root can do that, others become another user themselves."""
    if os.geteuid() == 0:
        os.chown(path, 54321, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x"), "damaged"),
    "flipped": (flipped, "damaged"),
    "unsealed": (lambda path: path.write_bytes(CONTENT), "damaged"),
    "of another name": (renamed, "damaged"),
    "sparse": (sparse, "more than any of ours"),
    "fifo": (fifo, "no regular file"),
    "directory": (directory, "no regular file"),
    "link": (linked, "symbolic link"),
    "device": (device, "symbolic link"),
    "written by all": (lambda path: path.chmod(0o666), "others may write to it, mode 0666"),
    "written by its group": (lambda path: path.chmod(0o664), "others may write to it, mode 0664"),
    "folder of all": (lambda path: path.parent.chmod(0o777), "others may write to its folder"),
}


@pytest.mark.parametrize(("damage", "why"), DAMAGE.values(), ids=DAMAGE)
def test_what_cannot_be_used(path: Path, cache: Cache, damage: Callable[[Path], object], why: str) -> None:
    """None, and one warning that names the path and the reason, for however many files."""
    damage(path)
    with pytest.warns(RuntimeWarning, match=f"file of a test .*a.cubin is not used .*{why}") as warned:
        assert [cache.get(path) for _ in range(3)] == [None] * 3
    assert len(warned) == 1
    with pytest.warns(RuntimeWarning, match="another cache"):
        assert Cache("another cache").get(path) is None


@pytest.mark.parametrize("damage", ["empty", "fifo", "link", "device", "written by all"])
def test_it_is_made_anew(path: Path, cache: Cache, damage: str) -> None:
    """A good file takes the place of what was there, which is left alone if it is elsewhere."""
    DAMAGE[damage][0](path)
    with pytest.warns(RuntimeWarning):
        assert cache.get(path) is None
    cache.put(path, CONTENT)
    assert cache.get(path) == CONTENT
    assert stat.S_ISREG(path.lstat().st_mode)


def test_a_folder_like_tmp(path: Path, cache: Cache) -> None:
    """Others can add files there, which are theirs, and not replace ours."""
    path.parent.chmod(0o1777)
    assert cache.get(path) == CONTENT


def test_a_file_of_somebody_else(path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(path, monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"it belongs to user \d+, expected \d+ or root"):
        assert cache.get(path) is None


def test_a_folder_of_somebody_else(path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept there, either: its owner could change it."""
    give_away(path.parent, monkeypatch)
    with pytest.raises(Unusable, match=r"its folder .* belongs to user \d+, expected"):
        files.make_folder(path.parent)
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning, match=r"a.cubin is not kept .* belongs to user"):
        cache.put(path, b"other")
    assert path.read_bytes() == before


def test_a_full_disk(path: Path, cache: Cache, full_disk: None) -> None:
    """One warning; nothing half written is left, and what was there stays."""
    with pytest.warns(RuntimeWarning, match=r"a.cubin is not kept \(File too large\)") as warned:
        [cache.put(path.with_name(name), bytes(1000)) for name in ("a.cubin", "b.cubin")]
    assert len(warned) == 1
    assert [x.name for x in path.parent.iterdir()] == [path.name]
    assert cache.get(path) == CONTENT


@pytest.mark.parametrize("place", ["/proc/none", "/dev/null/x"])
def test_a_folder_that_cannot_be_made(cache: Cache, place: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"{place}/a is not kept"):
        cache.put(Path(place) / "a", CONTENT)
    with pytest.raises(OSError, match=r"."):
        files.check_writable(Path(place))


def test_a_directory_in_the_place_of_a_file(path: Path, cache: Cache) -> None:
    directory(path)
    with pytest.warns(RuntimeWarning, match="is not kept"):
        cache.put(path, CONTENT)
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_interrupted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(path, b"other")
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_check_writable(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_warnings_as_errors_leave_nothing(path: Path, cache: Cache, full_disk: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            cache.put(path, bytes(1000))
    assert [x.name for x in path.parent.iterdir()] == [path.name]
