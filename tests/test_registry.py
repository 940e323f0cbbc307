"""Backends of others: entry points, registration, reasons, and what is chosen."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

import cce
from cce import plugins, registry
from cce.backends.base import Backend
from cce.backends.problem import Problem
from cce.backends.torch import TorchBackend
from cce.cli import main

E, C, T = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True), torch.arange(5)

LOOPBACK = """
    from cce.backends.torch import TorchBackend

    class Loopback(TorchBackend):
        name = "loopback"
        calls = []

        def forward(self, *args):
            self.calls.append("forward")
            return super().forward(*args)

        def backward(self, *args):
            self.calls.append("backward")
            return super().backward(*args)

        def loss_and_gradients(self, *args):
            self.calls.append("loss_and_gradients")
            return super().loss_and_gradients(*args)
"""


class Unable(Backend):
    """Can run nothing, for two reasons."""

    name = "unable"

    def unsupported(self, problem, spec):
        return [f"N={problem.n} is odd", f"block_v={spec.block_v} is too wide"]

    def forward(self, inputs, problem, spec, maps):
        raise AssertionError("an unable backend ran")

    def backward(self, inputs, problem, spec, outputs, maps, upstream):
        raise AssertionError("an unable backend ran")


class Second(TorchBackend):
    """The torch backend under another name."""

    name = "second"


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers, loads or installs is gone after it."""
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.setattr(registry, "_loaded", {})
    plugins.entry_points.cache_clear()
    yield
    plugins.entry_points.cache_clear()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Installs a distribution of one module with one entry point, as far as importlib.metadata can tell."""

    def install(name: str, target: str, source: str) -> None:
        module = target.partition(":")[0]
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[cce.backends]\n{name} = {target}\n")
        monkeypatch.syspath_prepend(tmp_path)
        imported.append(module)
        plugins.entry_points.cache_clear()
        assert metadata.version(module) == "1.0"

    imported: list[str] = []
    yield install
    for module in imported:
        sys.modules.pop(module, None)


def test_entry_point(install: Callable[[str, str, str], None]) -> None:
    """A third party's backend is used by its name, forward and backward, with the same result."""
    install("loopback", "cce_loopback:Loopback", LOOPBACK)
    assert cce.list_backends() == ["triton", "cupy", "numba", "torch", "reference", "loopback"]
    assert cce.explain(E, C, T, backend="loopback").backend == "loopback"
    calls = registry.load("loopback").calls
    for options, made in (({}, ["loss_and_gradients"]), ({"z_loss": 1e-4}, ["forward", "backward"])):
        found = cce.loss(E, C, T, backend="loopback", **options)
        de = torch.autograd.grad(found, E)[0]
        expected = cce.loss(E, C, T, backend="torch", **options)
        assert torch.equal(found, expected) and torch.equal(de, torch.autograd.grad(expected, E)[0])
        assert calls == made
        calls.clear()


def test_entry_point_is_loaded_when_it_is_used(install: Callable[[str, str, str], None]) -> None:
    install("eager", "cce_eager:Backend", "raise SystemExit('imported')")
    assert "eager" in cce.list_backends()
    cce.loss(E, C, T)


def test_entry_point_cannot_replace_a_built_in(install: Callable[[str, str, str], None]) -> None:
    install("torch", "cce_usurper:Loopback", LOOPBACK)
    assert cce.list_backends().count("torch") == 1
    assert type(registry.load("torch")) is TorchBackend


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_kernel_framework", "ModuleNotFoundError: No module named 'no_such_kernel_framework'"),
        ("raise ImportError('libcuda.so.1 is missing')", "ImportError: libcuda.so.1 is missing"),
        ("raise OSError('no driver')", "OSError: no driver"),
        ("x = 1", "AttributeError"),
        ("class Loopback: ...", "not a cce Backend"),
        ("def Loopback(): raise RuntimeError('no device')", "RuntimeError: no device"),
        ("import sys; sys.exit(7)", "SystemExit: 7"),
        ("def Loopback(): raise SystemExit('no license')", "SystemExit: no license"),
        ("class Stop(BaseException): ...\nraise Stop('here')", "Stop: here"),
        ("class Odd(Exception):\n    def __str__(self): raise KeyError\nraise Odd", "Odd"),
    ],
    ids=[
        "import",
        "library",
        "driver",
        "attribute",
        "class",
        "constructor",
        "exit",
        "exit when made",
        "base",
        "no text",
    ],
)
def test_what_cannot_be_loaded_is_a_reason(install: Callable[[str, str, str], None], source: str, reason: str) -> None:
    install("broken", "cce_broken:Loopback", source)
    explanation = cce.explain(E, C, T)
    assert explanation.backend == "torch"
    assert reason in explanation.reasons["broken"][0] and reason in str(explanation)
    assert cce.explain(E, C, T, backend="broken").backend is None
    with pytest.raises(cce.BackendUnavailable, match=re.escape(reason)):
        cce.loss(E, C, T, backend="broken")


def test_an_interrupt_is_the_users(install: Callable[[str, str, str], None]) -> None:
    install("slow", "cce_slow:Backend", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        cce.explain(E, C, T)


class Rude(TorchBackend):
    """Each of its methods that are asked before it runs fails in the way it is told to."""

    name = "rude"
    fails = ""

    def _answer(self, method: str, answer: object) -> object:
        if method != self.fails.partition(" ")[0]:
            return answer
        if self.fails.endswith("raises"):
            raise KeyError("mine")
        if self.fails.endswith("exits"):
            sys.exit(3)
        return {"none": None, "string": "too slow", "numbers": [1]}[self.fails.partition(" ")[2]]

    def unavailable(self, device):
        return self._answer("unavailable", [])

    def unsupported(self, problem, spec):
        return self._answer("unsupported", [])

    def one_pass(self, problem, spec):
        return self._answer("one_pass", None)

    def note(self, problem, spec):
        return self._answer("note", "")


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        *((f"{method} raises", f"its method {method} raised KeyError: 'mine'") for method in
          ("unavailable", "unsupported", "one_pass")),
        ("one_pass string", "its method one_pass returned a str, expected a cce.backends.base.OnePass or None"),
        ("unsupported exits", "its method unsupported raised SystemExit: 3"),
        ("unsupported none", "its method unsupported returned a NoneType, expected a list of strings"),
        ("unavailable string", "its method unavailable returned a str, expected a list of strings"),
        ("unavailable numbers", "its method unavailable returned a list, expected a list of strings"),
    ],
    ids=lambda text: text.replace(" ", "_") if len(text) < 20 else "",
)  # fmt: skip
def test_a_method_that_fails_is_a_reason(fails: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this backend; what others do is as before."""
    monkeypatch.setattr(Rude, "fails", fails)
    cce.register_backend("rude", Rude)
    found = cce.explain(E, C, T)
    assert found.backend == "torch" and found.reasons["rude"] == [reason]
    assert cce.explain(E, C, T, backend="rude").backend is None
    with pytest.raises(cce.BackendUnavailable, match=re.escape(reason)):
        cce.loss(E, C, T, backend="rude")


def test_a_note_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no reason not to run."""
    monkeypatch.setattr(Rude, "fails", "note raises")
    cce.register_backend("rude", Rude)
    found = cce.explain(E, C, T, backend="rude")
    assert found.backend == "rude" and "note raised KeyError: 'mine'" in str(found)
    torch.testing.assert_close(cce.loss(E, C, T, backend="rude"), cce.loss(E, C, T))


def test_two_of_one_name(install: Callable[[str, str, str], None]) -> None:
    """Neither is taken for the other: the error names both distributions."""
    install("twin", "cce_first:Loopback", LOOPBACK)
    install("twin", "cce_second:Loopback", LOOPBACK)
    assert cce.list_backends().count("twin") == 1
    found = cce.explain(E, C, T)
    assert found.backend == "torch"
    with pytest.raises(cce.BackendUnavailable) as caught:
        cce.loss(E, C, T, backend="twin")
    for part in ("'twin'", "cce_first 1.0", "cce_second 1.0", "cce_first:Loopback", "cce_second:Loopback"):
        assert part in str(caught.value) and part in found.reasons["twin"][0]
    cce.register_backend("twin", Second, replace=True)
    assert type(registry.load("twin")) is Second


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_names_that_are_taken(install: Callable[[str, str, str], None], name: str) -> None:
    """The entry point is no backend, and explain says so."""
    before = cce.list_backends()
    install(name, "cce_usurper:Loopback", LOOPBACK)
    assert cce.list_backends() == before
    found = cce.explain(E, C, T)
    assert found.backend == "torch" and found.reasons["torch"] == []
    assert "is taken by cce" in found.reasons[f"{name} (cce_usurper 1.0)"][0]
    cce.loss(E, C, T)


def test_info_shows_them_all(
    install: Callable[[str, str, str], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rude, "fails", "unavailable raises")
    monkeypatch.setenv("COLUMNS", "300")
    cce.register_backend("rude", Rude)
    install("leaves", "cce_leaves:Loopback", "import sys; sys.exit(7)")
    install("auto", "cce_usurper:Loopback", LOOPBACK)
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for part in ("KeyError: 'mine'", "SystemExit: 7", "auto (cce_usurper 1.0)", "runs torch"):
        assert part in shown


def test_damaged_metadata(install: Callable[[str, str, str], None], tmp_path: Path) -> None:
    """Of whatever distribution: others' backends are there."""
    install("loopback", "cce_loopback:Loopback", LOOPBACK)
    install("lost", "cce_lost:Loopback", LOOPBACK)
    (tmp_path / "cce_lost-1.0.dist-info" / "entry_points.txt").write_bytes(b"[cce.backends]\nno value\n")
    with pytest.warns(RuntimeWarning, match="entry points of cce_lost in .* cannot be read") as warned:
        found = cce.list_backends()
    assert "loopback" in found and "lost" not in found and len(warned) == 1
    assert cce.explain(E, C, T, backend="loopback").backend == "loopback"


def test_auto_takes_no_third_party_and_no_reference(install: Callable[[str, str, str], None]) -> None:
    """Not even where nothing else can run; a loss does not so much as load them."""
    install("loopback", "cce_loopback:Loopback", LOOPBACK)
    cce.register_backend("mine", Second)
    cce.loss(E, C, T)
    assert set(registry._loaded) == {"torch"}
    assert cce.explain(E, C, T).backend == "torch"
    cce.register_backend("torch", Unable, replace=True)
    with pytest.raises(cce.BackendUnavailable, match="torch: N=5 is odd"):
        cce.loss(E, C, T)
    assert cce.explain(E, C, T).backend is None


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    cce.register_backend("unable", Unable)
    cce.register_backend("second", Second)
    monkeypatch.setattr(registry, "AUTO_ELSEWHERE", ("unable", "second", "torch"))
    cce.loss(E, C, T)
    assert set(registry._loaded) == {"unable", "second"}
    assert cce.explain(E, C, T).backend == "second"


def test_explain_names_a_backend_as_users_do() -> None:
    """By the name it was registered under, whatever its class calls itself."""
    cce.register_backend("mine", TorchBackend)
    assert cce.explain(E, C, T, backend="mine").backend == "mine"


def test_unavailable_lists_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every backend tried, beside the problem and the spec they were found for."""
    cce.register_backend("unable", Unable)
    cce.register_backend("gone", lambda: 1 / 0)
    monkeypatch.setattr(registry, "AUTO_ELSEWHERE", ("unable", "gone"))
    with pytest.raises(cce.BackendUnavailable) as caught:
        cce.loss(E, C, T, spec=cce.Spec(block_v=77))
    message = str(caught.value)
    for part in (
        "unable: N=5 is odd",
        "unable: block_v=77 is too wide",
        "gone:",
        "ZeroDivisionError",
        "Problem(n=5, v=9",
    ):
        assert part in message, message
    with pytest.raises(cce.BackendUnavailable) as caught:
        cce.loss(E, C, T, backend="unable")
    assert "gone" not in str(caught.value)
    assert cce.explain(E, C, T).reasons["unable"] == ["N=5 is odd", "block_v=128 is too wide"]


def test_named_backend_never_falls_back() -> None:
    cce.register_backend("unable", Unable)
    with pytest.raises(cce.BackendUnavailable, match="N=5 is odd"):
        cce.loss(E, C, T, backend="unable")


def test_no_backend_means_no_loss_without_rows_either() -> None:
    """A batch whose rows are all ignored must not hide that the backend cannot run."""
    cce.register_backend("unable", Unable)
    with pytest.raises(cce.BackendUnavailable):
        cce.loss(E, C, torch.full((5,), -100), backend="unable")


def test_register_replace_unregister() -> None:
    made = []

    def factory() -> Backend:
        made.append(TorchBackend())
        return made[-1]

    cce.register_backend("mine", factory)
    assert "mine" in cce.list_backends() and not made
    cce.loss(E, C, T, backend="mine")
    cce.loss(E, C, T, backend="mine").backward()
    assert len(made) == 1
    with pytest.raises(ValueError, match=r"'mine' exists already"):
        cce.register_backend("mine", Unable)
    cce.register_backend("mine", Unable, replace=True)
    with pytest.raises(cce.BackendUnavailable):
        cce.loss(E, C, T, backend="mine")
    cce.unregister_backend("mine")
    assert "mine" not in cce.list_backends()
    with pytest.raises(ValueError, match="'mine'"):
        cce.loss(E, C, T, backend="mine")
    with pytest.raises(ValueError, match="'mine'"):
        cce.unregister_backend("mine")


def test_replaced_built_in_returns() -> None:
    cce.register_backend("torch", Unable, replace=True)
    with pytest.raises(cce.BackendUnavailable, match="N=5 is odd"):
        cce.loss(E, C, T)
    cce.unregister_backend("torch")
    cce.loss(E, C, T)
    assert type(registry.load("torch")) is TorchBackend


def test_a_factory_may_succeed_later() -> None:
    """A failure is not remembered: a driver may come back, a package be installed."""
    ready = False

    def factory() -> Backend:
        if not ready:
            raise RuntimeError("not ready")
        return TorchBackend()

    cce.register_backend("slow", factory)
    with pytest.raises(cce.BackendUnavailable, match="not ready"):
        cce.loss(E, C, T, backend="slow")
    ready = True
    cce.loss(E, C, T, backend="slow")


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"label_smoothing": 0.1}], ids=str)
def test_scratch_too_small_names_what_is_needed(options: dict) -> None:
    with pytest.raises(cce.BackendUnavailable, match="scratch_bytes=1 ") as caught:
        cce.loss(E, C, T, spec=cce.Spec(scratch_bytes=1), **options)
    needed = int(re.search(r"less than the (\d+) bytes", str(caught.value))[1])
    with pytest.raises(cce.BackendUnavailable):
        cce.loss(E, C, T, spec=cce.Spec(scratch_bytes=needed - 1), **options)
    found = cce.loss(E, C, T, spec=cce.Spec(scratch_bytes=needed), **options)
    torch.testing.assert_close(found, cce.loss(E, C, T, **options))
    torch.autograd.grad(found, (E, C))


def test_unsupported_sees_the_problem_of_the_call() -> None:
    """All rows, whatever their targets; the spec is resolved, and the gradients are those that are wanted."""
    seen: list[tuple[Problem, cce.Spec]] = []

    class Watching(TorchBackend):
        def unsupported(self, problem, spec):
            seen.append((problem, spec))
            return super().unsupported(problem, spec)

    cce.register_backend("watching", Watching)
    cce.loss(E, C.detach(), torch.tensor([0, -100, 1, -100, 2]), backend="watching")
    problem, spec = seen[0]
    assert (problem.n, problem.v, problem.d) == (5, 9, 3)
    assert (problem.grad_e, problem.grad_c) == (True, False)
    assert spec.filter == "none" and spec.block_n and spec.block_v and spec.accumulate == "float32"
