"""Every option of the public interface, as data: the rows of docs/options.md, each of which the kit runs.

A row says what a call looks like; :meth:`Option.explain` asks the backends about it, ``check_option`` runs it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import cce
from cce.backends.problem import Problem
from cce.frontend.checks import OUTPUTS
from cce.spec import Spec

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
EXACT: dict[str, Any] = {"filter": "none"}
#: Small tiles and a high threshold, so that some of a small problem are skipped.
FILTERED: dict[str, Any] = {"filter": "element", "threshold": 2.0**-6, "block_n": 16, "block_v": 16}
# Of the gradients' dtype; of a filter with that threshold.
_ROUNDED, _SKIPPED = 5e-3, 2e-2

#: Options that reach no kernel: the front end makes them of the outputs, or the host of memory.
_IN_FRONT = ("reduction", "shift", "ignore_index", "z_loss", "`weight` (classes)", "token_weight", "`nll`", "scratch")

BATCH, LENGTH, D, V, K = 2, 12, 16, 70, 3


@dataclass(frozen=True)
class Option:
    """One option, or one value of an option, on top of a plain call.

    Args:
        name: as the table shows it.
        call: options of ``cce.loss``, or of ``cce.terms``.
        tensors: those of "bias", "weight", "token_weight" and "target_weight" that are given.
        outputs: of ``cce.terms``, which is called in place of ``cce.loss``.
        e_dtype, c_dtype: dtypes.
        spec: fields of the Spec; ``vocab_order=range(V)`` stands for a permutation that is not the identity.
        frozen: those of "e" and "c" that need no gradient.
        strided: ``e`` and ``c`` are transposed views.
        autocast: its dtype. compiled: under ``torch.compile(fullgraph=True)``.
        tolerance: relative error of values and gradients against the dense float64 formula.
        at_least: what the error of dE exceeds, since a filter skips something.
    """

    name: str
    call: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    e_dtype: torch.dtype = F32
    c_dtype: torch.dtype = F32
    spec: dict[str, Any] = field(default_factory=lambda: EXACT)
    frozen: tuple[str, ...] = ()
    strided: bool = False
    autocast: torch.dtype | None = None
    compiled: bool = False
    tolerance: float = 2e-5
    at_least: float = 0.0

    def __str__(self) -> str:
        return self.name

    @property
    def short(self) -> bool:
        """A kernel hears of it: one of those for an interpreter."""
        return not self.compiled and not any(name in self.name for name in _IN_FRONT)

    def make_spec(self) -> Spec:
        return Spec(**self.spec)

    def autocasting(self, device: str) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast is None else torch.autocast(device, self.autocast)

    def problem(self, device: str) -> Problem:
        """The metadata of the call on a device that need not be there."""
        call: dict[str, Any] = {**make_data(self, "cpu"), **self.call}
        with self.autocasting("cpu"):
            found = cce.explain(**call).problem
        extra = frozenset(self.outputs) & {"entropy", "prediction"}
        return replace(found, device=device, outputs=found.outputs | extra)


def make_data(option: Option, device: str) -> dict[str, Tensor]:
    """The tensors of a call, of order 1; a few targets are ignored."""
    rng = torch.Generator().manual_seed(5)
    mean = torch.randn(D, generator=rng)
    mean /= mean.norm()
    e = torch.randn(BATCH, LENGTH, D, generator=rng) + 4 * mean
    # As in a trained model: logits fall with the rank of an entry, along one direction, and few targets rank high.
    c = torch.randn(V, D, generator=rng) / D**0.5 - 0.6 * torch.arange(1, V + 1).log()[:, None] * mean
    targets = (V * torch.rand(BATCH, LENGTH, generator=rng) ** 3).long()
    targets[1, 3:6] = option.call.get("ignore_index", -100)
    found = {"targets": targets}
    if "target_weight" in option.tensors:
        found["targets"] = torch.stack([targets, *(targets.roll(k, 1) for k in range(1, K))], -1)
    given = {
        "bias": torch.randn(V, generator=rng).to(option.c_dtype),
        "weight": torch.rand(V, generator=rng) + 0.5,
        "token_weight": torch.rand(BATCH, LENGTH, generator=rng) + 0.5,
        "target_weight": torch.rand(BATCH, LENGTH, K, generator=rng),
    }
    found |= {name: x for name, x in given.items() if name in option.tensors}
    found |= {"e": e.to(option.e_dtype), "c": c.to(option.c_dtype)}
    for name, x in found.items():
        x = x.mT.contiguous().mT if option.strided and name in "ec" else x
        found[name] = x.to(device).requires_grad_(name not in ("targets", "weight", *option.frozen))
    return found


def _dtypes() -> list[Option]:
    low: dict[str, Any] = {"tolerance": _ROUNDED}
    return [
        Option("float32"),
        Option("bfloat16, exact", e_dtype=BF16, c_dtype=BF16, **low),
        Option("float16, exact", e_dtype=F16, c_dtype=F16, **low),
        Option("bfloat16, default spec", e_dtype=BF16, c_dtype=BF16, spec={}, **low),
        Option("float16, default spec", e_dtype=F16, c_dtype=F16, spec={}, **low),
        Option("float64", e_dtype=F64, c_dtype=F64, tolerance=1e-12),
        Option("`e` bfloat16, `c` float32", e_dtype=BF16, **low),
        Option("`e` float32, `c` bfloat16", c_dtype=BF16, **low),
        Option("`e` float16, `c` bfloat16", e_dtype=F16, c_dtype=BF16, **low),
    ]


def _spec() -> list[Option]:
    skipped: dict[str, Any] = {"tolerance": _SKIPPED, "at_least": 1e-4}
    return [
        Option('`filter="none"`'),
        Option('`filter="element"`', spec=FILTERED, **skipped),
        Option('`filter="tile"`', spec={**FILTERED, "filter": "tile", "threshold": 2.0**-4}, **skipped),
        Option("`compensate=False`", spec={**FILTERED, "compensate": False}, tolerance=0.1, at_least=_SKIPPED),
        Option('`row_order="natural"`', spec={**FILTERED, "row_order": "natural"}, **skipped),
        Option('`vocab_order="natural"`', spec={**FILTERED, "vocab_order": "natural"}, **skipped),
        Option("`vocab_order`, a permutation", spec={**FILTERED, "vocab_order": range(V)[::-1]}, **skipped),
        Option(
            "`vocab_order`, a permutation, exact",
            outputs=OUTPUTS,
            spec={"filter": "none", "vocab_order": range(V)[::-1]},
        ),
        Option('`lse_accumulation="online"`', spec={**EXACT, "lse_accumulation": "online"}),
        Option('`accumulate="float64"`', spec={**EXACT, "accumulate": "float64"}),
        Option("`block_n=7, block_v=50`, exact", spec={**EXACT, "block_n": 7, "block_v": 50}),
        Option("`block_n=7, block_v=50`, filtered", spec={**FILTERED, "block_n": 7, "block_v": 50}, **skipped),
        Option("`scratch_bytes=65536`", spec={**EXACT, "scratch_bytes": 65536}),
        Option("`scratch_bytes=64`, too few", spec={**EXACT, "scratch_bytes": 64}),
    ]


OPTIONS: dict[str, list[Option]] = {
    "Of the model": [
        Option("`bias`", tensors=("bias",)),
        Option("`softcap`", {"softcap": 3.0}),
        Option("`softcap`, far above the logits", {"softcap": 1e6}),
        Option("`logit_scale`", {"logit_scale": 0.5}),
        Option("`softcap`, `logit_scale`, `bias`", {"softcap": 3.0, "logit_scale": 0.5}, ("bias",)),
    ],
    "Of the loss": [
        Option('`reduction="mean"`'),
        Option('`reduction="sum"`', {"reduction": "sum"}),
        Option('`reduction="none"`', {"reduction": "none"}),
        Option("`shift`", {"shift": 1}),
        Option("`ignore_index`", {"ignore_index": 5}),
        Option("`label_smoothing`", {"label_smoothing": 0.2}),
        Option("`z_loss`", {"z_loss": 0.1}),
        Option("`weight` (classes)", tensors=("weight",)),
        Option("`weight`, `label_smoothing`", {"label_smoothing": 0.2}, ("weight",)),
        Option("`token_weight`", tensors=("token_weight",)),
        Option("`target_weight` (soft targets)", tensors=("target_weight",)),
        Option(
            "all of them",
            {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "logit_scale": 0.5, "shift": 1},
            ("bias", "weight", "token_weight", "target_weight"),
        ),
    ],
    "Outputs of `cce.terms`": [
        Option("`nll`", outputs=("nll",)),
        Option("`lse`", outputs=("lse",)),
        Option("`entropy`", outputs=("entropy",)),
        Option("`prediction`", outputs=("nll", "prediction")),
        Option("all, with `softcap` and `shift`", {"softcap": 3.0, "shift": 1}, outputs=OUTPUTS),
        Option("`nll`, filtered", outputs=("nll",), spec=FILTERED, tolerance=_SKIPPED, at_least=1e-4),
    ],
    "Dtypes": _dtypes(),
    "Of `cce.Spec`": _spec(),
    "In PyTorch": [
        Option("frozen `e`", frozen=("e",)),
        Option("frozen `c`", frozen=("c",)),
        Option("any strides", strided=True),
        Option("autocast, bfloat16", autocast=BF16, tolerance=_ROUNDED),
        Option("autocast, float16", autocast=F16, tolerance=_ROUNDED),
        Option("`torch.compile(fullgraph=True)`", compiled=True),
    ],
}
