"""The folder of tuned configurations: what is written is read, what is no configuration is passed over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cce.backends.problem import Problem
from cce.backends.resolve import resolve
from cce.backends.triton import choice, tunecache
from cce.backends.triton.launch import TILES, Device, Tile, shipped
from cce.spec import Spec

DEVICE = Device("A GPU", (9, 0), 132, "ieee")
PROBLEM = Problem(
    n=1000, v=5000, d=256, e_dtype=torch.bfloat16, c_dtype=torch.bfloat16, device="cuda", grad_e=True, grad_c=True
)
SPEC = resolve(Spec(filter="element"), PROBLEM)
TILE = Tile(128, 128, 32, stages=2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_warned_of: None) -> Iterator[Path]:
    folder = tmp_path / "launch"
    folder.mkdir()
    monkeypatch.setenv("CCE_TUNE_CACHE", str(folder))
    choice.forget()
    yield folder
    choice.forget()


def key(problem: Problem = PROBLEM, spec: Spec = SPEC, device: Device = DEVICE, ordered: bool = False) -> str:
    return tunecache.key_of(problem, spec, device, ordered)


def test_round_trip(folder: Path) -> None:
    tiles = {name: replace(TILE, stages=stages) for stages, name in enumerate(TILES, 1)}
    path = tunecache.store(folder, key(), tiles, {"tuned": "today"})
    assert tunecache.entries(folder) == {key(): tiles}
    assert list(folder.iterdir()) == [path]
    assert json.loads(path.read_text())["notes"] == {"tuned": "today"}


def test_a_second_result_takes_the_place_of_the_first(folder: Path) -> None:
    tunecache.store(folder, key(), {"forward": TILE}, {})
    tunecache.store(folder, key(), {"forward": replace(TILE, stages=4)}, {})
    tunecache.store(folder, key(replace(PROBLEM, d=128)), {"forward": TILE}, {})
    found = tunecache.entries(folder)
    assert len(found) == len(list(folder.iterdir())) == 2
    assert found[key()]["forward"].stages == 4


CHANGES: dict[str, dict[str, Any]] = {
    "name": {"device": replace(DEVICE, name="Another")},
    "capability": {"device": replace(DEVICE, capability=(8, 0))},
    "multiprocessors": {"device": replace(DEVICE, programs=114)},
    "n": {"problem": replace(PROBLEM, n=1025)},
    "v": {"problem": replace(PROBLEM, v=5001)},
    "d": {"problem": replace(PROBLEM, d=257)},
    "k": {"problem": replace(PROBLEM, k=2)},
    "e": {"problem": replace(PROBLEM, e_dtype=torch.float16)},
    "c": {"problem": replace(PROBLEM, c_dtype=torch.float32)},
    "bias": {"problem": replace(PROBLEM, bias=True)},
    "softcap": {"problem": replace(PROBLEM, softcap=30.0)},
    "logit_scale": {"problem": replace(PROBLEM, logit_scale=2.0)},
    "entropy": {"problem": replace(PROBLEM, outputs=frozenset({"entropy"}))},
    "gradients": {"problem": replace(PROBLEM, grad_e=False)},
    "filter": {"spec": replace(SPEC, filter="tile")},
    "no filter": {"spec": replace(SPEC, filter="none")},
    "block_n": {"spec": replace(SPEC, block_n=64)},
    "block_v": {"spec": replace(SPEC, block_v=64)},
    "lse": {"spec": replace(SPEC, lse_accumulation="online")},
    "scratch": {"spec": replace(SPEC, scratch_bytes=2**20)},
    "order": {"ordered": True},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_key_changes_with(change: dict[str, Any]) -> None:
    assert key(**change) != key()


@pytest.mark.parametrize("name", ["cce", "triton", "cuda"])
def test_key_changes_with_the_version_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    other = {**tunecache.versions(), name: "99"}
    monkeypatch.setattr(tunecache, "versions", lambda: other)
    assert key() != before


def test_key_does_not_change_with_what_makes_no_other_kernel() -> None:
    assert key(replace(PROBLEM, n=513)) == key(replace(PROBLEM, n=1024)) == key()
    assert key(spec=replace(SPEC, threshold=0.25, compensate=False)) == key()
    assert key(device=replace(DEVICE, precision="tf32")) == key()  # of float32 products
    wide = replace(PROBLEM, e_dtype=torch.float32, c_dtype=torch.float32)
    assert key(wide, device=replace(DEVICE, precision="tf32")) != key(wide)
    exact = replace(SPEC, filter="none")
    assert key(spec=replace(exact, block_n=64, block_v=64), ordered=True) == key(spec=exact)


def test_a_tuned_configuration_is_chosen(folder: Path) -> None:
    launch = shipped(PROBLEM, SPEC, DEVICE)
    assert choice.choose(PROBLEM, SPEC, DEVICE, False) == launch and not launch.tuned
    tunecache.store(folder, key(), {"forward": TILE}, {})
    assert choice.choose(PROBLEM, SPEC, DEVICE, False) == launch  # the folder is read once
    choice.forget()
    assert choice.choose(PROBLEM, SPEC, DEVICE, False) == replace(launch, forward=TILE, tuned=True)
    # As many rows, about.
    assert choice.choose(replace(PROBLEM, n=700), SPEC, DEVICE, False).tuned
    for change in CHANGES.values():
        arguments = {"problem": PROBLEM, "spec": SPEC, "device": DEVICE, "ordered": False, **change}
        assert not choice.choose(**arguments).tuned


@pytest.mark.parametrize("kernel", ["forward", "sparse", "de", "dc"])
def test_a_configuration_that_breaks_the_spec_is_not_used(kernel: str, folder: Path) -> None:
    """Which a file edited by hand may hold: the filter's blocks are not its to choose."""
    wrong = Tile(256, 16, 256, warps=4)
    tunecache.store(folder, key(), {kernel: wrong}, {})
    with pytest.warns(RuntimeWarning, match=r"does not fit .* shipped one is used"):
        found = choice.choose(PROBLEM, SPEC, DEVICE, False)
    assert found == shipped(PROBLEM, SPEC, DEVICE)


def good(folder: Path) -> dict[str, Any]:
    return json.loads(tunecache.store(folder, key(), {"forward": TILE}, {}).read_text())


def sealed(content: Any) -> Any:
    """As one who knows how could write it by hand."""
    if not isinstance(content, dict):
        return content
    return {**content, "digest": tunecache._digest(content)}


DAMAGE: dict[str, Any] = {
    "no object": lambda content: [content],
    "another format": lambda content: {**content, "format": "recipe 1"},
    "no format": lambda content: {"key": {}},
    "no key": lambda content: {k: v for k, v in content.items() if k != "key"},
    "no tiles": lambda content: {**content, "tiles": {}},
    "unknown kernel": lambda content: {**content, "tiles": {"backward": content["tiles"]["forward"]}},
    "unknown field": lambda content: {**content, "tiles": {"forward": {**content["tiles"]["forward"], "cluster": 2}}},
    "field missing": lambda content: {**content, "tiles": {"forward": {"rows": 128}}},
    "not a tile": lambda content: {**content, "tiles": {"forward": 128}},
    "odd": lambda content: {**content, "tiles": {"forward": {**content["tiles"]["forward"], "rows": 100}}},
    "too large": lambda content: {**content, "tiles": {"forward": {**content["tiles"]["forward"], "warps": 2**40}}},
    "negative": lambda content: {**content, "tiles": {"forward": {**content["tiles"]["forward"], "stages": -1}}},
    "a float": lambda content: {**content, "tiles": {"forward": {**content["tiles"]["forward"], "depth": 32.0}}},
    "a string": lambda content: {**content, "tiles": {"forward": {**content["tiles"]["forward"], "flatten": "yes"}}},
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_foreign_files_are_passed_over(damage: Any, folder: Path) -> None:
    """With one warning; what is well beside them is read."""
    (folder / "0.json").write_text(json.dumps(sealed(damage(good(folder)))))
    (folder / "1.json").write_text("{")
    with pytest.warns(RuntimeWarning, match=r"0\.json is not a launch configuration") as warned:
        assert choice.choose(PROBLEM, SPEC, DEVICE, False).tuned
    assert not choice.choose(replace(PROBLEM, n=2000), SPEC, DEVICE, False).tuned
    assert len(warned) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 10**5, b"null"])
def test_corrupt_files_are_passed_over(content: bytes, folder: Path) -> None:
    (folder / "0.json").write_bytes(content)
    good(folder)
    with pytest.warns(RuntimeWarning, match=r"0\.json is not a launch configuration"):
        assert choice.choose(PROBLEM, SPEC, DEVICE, False).tuned


def test_a_file_changed_by_hand_is_passed_over(folder: Path) -> None:
    content = good(folder)
    (path,) = folder.iterdir()
    content["tiles"]["forward"]["stages"] = 3
    path.write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match="it was changed: its digest"):
        assert tunecache.entries(folder) == {}


def test_layout_does_not_count(folder: Path) -> None:
    """What is copied by way of another tool says the same."""
    content = good(folder)
    (path,) = folder.iterdir()
    path.write_text(json.dumps(content, sort_keys=True))
    assert tunecache.entries(folder) == {key(): {"forward": TILE}}


def test_results_of_former_releases(folder: Path) -> None:
    """They would not be used anyway, and do no harm."""
    (folder / "0.json").write_text(json.dumps({**good(folder), "format": "cce launch configuration 1"}))
    assert list(tunecache.entries(folder)) == [key()]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def writable_by_all(path: Path) -> None:
    path.touch()
    path.chmod(0o666)


@pytest.mark.parametrize("place", [fifo, endless, writable_by_all, Path.mkdir])
def test_only_regular_files_of_ours_are_read(place: Any, folder: Path) -> None:
    """Reading the others would not end, or would trust anybody."""
    place(folder / "0.json")
    good(folder)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(10)
    with pytest.warns(RuntimeWarning, match=r"0\.json") as warned:
        assert list(tunecache.entries(folder)) == [key()]
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert len(warned) == 1


def test_other_files_are_not_looked_at(folder: Path) -> None:
    (folder / "README").write_text("mine")
    (folder / "0123.1-ab.partial").write_text("{")
    assert tunecache.entries(folder) == {}


def test_a_folder_that_is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "file"
    path.touch()
    monkeypatch.setenv("CCE_TUNE_CACHE", str(path))
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert choice.choose(PROBLEM, SPEC, DEVICE, False) == shipped(PROBLEM, SPEC, DEVICE)
    with pytest.raises(ValueError, match=r"CCE_TUNE_CACHE: got .*file', expected a folder to write to"):
        tunecache.writable()


def test_environment(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tunecache.folder() == tunecache.writable() == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CCE_TUNE_CACHE", "~/mine")
    assert tunecache.folder() == tmp_path / "mine"
    monkeypatch.setenv("CCE_TUNE_CACHE", "")
    assert tunecache.folder() == tmp_path / "cache/cce/launch"
    assert tunecache.entries(tunecache.folder()) == {}  # there is none yet
    assert tunecache.writable().is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert tunecache.folder() == tmp_path / ".cache/cce/launch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("CCE_TUNE_CACHE")
    assert tunecache.folder() == tmp_path / ".cache/cce/launch"


def test_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(folder)
    monkeypatch.setenv("CCE_TUNE_CACHE", "off")
    assert tunecache.folder() is None
    assert not choice.choose(PROBLEM, SPEC, DEVICE, False).tuned
    with pytest.raises(ValueError, match="CCE_TUNE_CACHE: got 'off', expected a folder"):
        tunecache.writable()


def test_nothing_half_written_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(folder)
    before = sorted(folder.iterdir())

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ValueError, match=r"CCE_TUNE_CACHE: got .*launch', expected .* \(No space"):
        tunecache.store(folder, key(), {"forward": replace(TILE, stages=4)}, {})
    with pytest.raises(ValueError, match=r"CCE_TUNE_CACHE: got .*launch', expected .* \(No space"):
        tunecache.writable()
    assert sorted(folder.iterdir()) == before
    assert tunecache.entries(folder) == {key(): {"forward": TILE}}


def test_a_folder_that_anybody_may_write_to(folder: Path) -> None:
    """Nothing of it would be used: the tuner says so before it works."""
    folder.chmod(0o777)
    with pytest.raises(ValueError, match=r"CCE_TUNE_CACHE: got .*launch', expected .*others may write"):
        tunecache.writable()


def write(folder: Path, writer: int, files: int) -> None:
    """Stores a configuration of the writer's own under keys that all writers share, and one under a key of its own."""
    tile = Tile(128, 128, 32, stages=1 + writer)
    for i in range(files):
        tunecache.store(folder, json.dumps({"i": i}), {"forward": tile}, {"padding": "x" * 100_000})
    tunecache.store(folder, json.dumps({"writer": writer}), {"forward": tile}, {})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on, where there are threads
def test_concurrent_writers(folder: Path) -> None:
    """Nobody reads half a file, nobody's file is lost."""
    writers, files = 3, 15
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write, args=(folder, i, files)) for i in range(writers)]
    for process in processes:
        process.start()
    reads = 0
    while any(process.is_alive() for process in processes):
        tunecache.entries.cache_clear()
        tunecache.entries(folder)  # warnings are errors
        reads += 1
    assert [process.exitcode for process in processes] == [0] * writers
    tunecache.entries.cache_clear()
    found = tunecache.entries(folder)
    assert len(found) == len(list(folder.iterdir())) == files + writers
    for i in range(writers):
        assert found[json.dumps({"writer": i})]["forward"].stages == 1 + i
    assert reads > 0
