"""The conformance cases: as data, shared by every backend, from sizes and options that have broken peers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from cce.spec import Spec

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One problem at the level of the backend interface.

    Args:
        name: the test's id.
        n, d, v, k: sizes; ``m`` rows of ``e``, of which ``n`` are in use (None: all of them).
        e_dtype, c_dtype: dtypes.
        data: "random", "peaked" (Zipf frequencies, a common mean row: tiles are really skipped), "aligned"
            (rows of ``c`` equal to rows of ``e``: p near 1), "certain" (of small logits one stands out: p near 1),
            "large_bias", "masked" (bias of -inf, also whole tiles), "masked_low", "masked_high" (the same, all other
            logits near -300 or 300: exp() of no difference to a masked tile's maximum, or to 0 in its place, is a
            number).
        strided: ``e`` and ``c`` are transposed views.
        offset: added to all logits, exactly; a power of two.
        offset_by: "product" (a column of ``e`` equal to it, of ``c`` equal to 1) or "bias".
        bias, softcap, logit_scale, outputs, logit_weight, vocab_order: as in Problem and Inputs.
        wanted: the gradients asked for.
        spec: fields of the Spec.
    """

    name: str
    n: int = 37
    d: int = 19
    v: int = 301
    k: int = 1
    m: int | None = None
    e_dtype: torch.dtype = F32
    c_dtype: torch.dtype = F32
    data: str = "random"
    strided: bool = False
    offset: float = 0.0
    offset_by: str = "product"
    bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: tuple[str, ...] = ()
    logit_weight: bool = False
    vocab_order: bool = False
    wanted: tuple[str, ...] = ("e", "c", "bias")
    spec: dict[str, Any] = field(default_factory=lambda: {"filter": "none"})

    def __str__(self) -> str:
        return self.name

    @property
    def short(self) -> bool:
        """It is one for an interpreter, which takes seconds for it."""
        return self.n < 1000 and self.n * self.v < 2**19

    def of(self, dtype: torch.dtype) -> Case:
        """The same case with both inputs in ``dtype``."""
        return replace(self, name=f"{self.name}-{str(dtype).removeprefix('torch.')}", e_dtype=dtype, c_dtype=dtype)

    def make_spec(self, **fields: Any) -> Spec:
        return Spec(**{**self.spec, **fields})


EVERYTHING = ("entropy", "weighted_logit", "prediction")
_BLOCKS = {"block_n": 16, "block_v": 32}
_DEFAULT = {**_BLOCKS, "scratch_bytes": 2**17}  # too few for all logits: filtered on every device
_MANY_CHUNKS = {"filter": "none", "scratch_bytes": 1_130_000}
_FILTERED = {**_BLOCKS, "filter": "element", "threshold": 2.0**-9}
_MASS = {**_FILTERED, "filter": "tile", "threshold": 2.0**-6}


def _shapes() -> list[Case]:
    """Sizes that are no multiple of anything, and the smallest ones."""
    return [
        Case("one-row", n=1, d=8, v=7),
        Case("one-class", n=5, d=4, v=1),
        Case("one-dim", n=9, d=1, v=33, bias=True),
        Case("two-classes", n=6, d=3, v=2, bias=True),
        Case("unaligned", n=132, d=123, v=267, bias=True),
        Case("aligned", n=128, d=64, v=512),
        Case("odd-dim", n=65, d=33, v=257),
        Case("many-tiles", n=17, d=16, v=2051, spec={"filter": "none", "block_v": 64, "block_n": 16}),
        Case("online", n=70, d=24, v=700, outputs=("entropy",), spec={"filter": "none", "lse_accumulation": "online"}),
        Case("small-scratch", n=150, d=80, v=1000, bias=True, spec={"filter": "none", "scratch_bytes": 2**18}),
        # Losses whose gradients are computed along with them, of some rows at a time on GPUs.
        Case("row-chunks", n=1300, d=24, v=300, bias=True, spec={"filter": "none", "scratch_bytes": 1_420_000}),
        Case("row-chunks-frozen-c", n=1100, m=1200, d=24, v=900, k=2, wanted=("e",), spec=_MANY_CHUNKS),
        replace(
            Case("row-chunks", n=1300, d=24, v=300, spec={"filter": "none", "scratch_bytes": 735_000}).of(BF16),
            logit_scale=0.5,
            softcap=12.0,
        ),
    ]


def _options() -> list[Case]:
    """Every option alone and all together, without a filter."""
    return [
        Case("bias", bias=True),
        Case("large-bias", bias=True, data="large_bias"),
        Case("masked", bias=True, data="masked", outputs=("entropy", "prediction"), spec=_small("none")),
        Case("masked-low", v=900, bias=True, data="masked_low", outputs=("entropy", "prediction"), spec=_small("none")),
        Case("masked-low-loss", v=900, bias=True, data="masked_low"),
        Case("masked-high", v=900, bias=True, data="masked_high", outputs=("entropy",)),
        Case("softcap", softcap=1.5, bias=True, data="peaked"),
        Case("softcap-ragged", softcap=0.5, n=33, v=65),
        Case("softcap-1e4", softcap=1e4, bias=True, outputs=("entropy",)),
        Case("softcap-1e6", softcap=1e6, outputs=("weighted_logit",)),
        Case("scale", logit_scale=0.25, bias=True),
        Case("scale-softcap", logit_scale=3.0, softcap=5.0),
        Case("entropy", outputs=("entropy",)),
        Case("entropy-peaked", outputs=("entropy",), data="aligned"),
        Case("entropy-softcap", outputs=("entropy",), softcap=2.0, bias=True),
        Case("prediction", outputs=("prediction",), data="peaked"),
        Case("mean-logit", outputs=("weighted_logit",), bias=True),
        Case("weighted-logit", outputs=("weighted_logit",), logit_weight=True, logit_scale=0.5, bias=True),
        Case("weighted-logit-softcap", outputs=("weighted_logit",), logit_weight=True, softcap=2.0),
        Case("soft-targets", k=5),
        Case("aligned-data", data="aligned", bias=True),
        Case("rows-left-out", n=23, m=40, bias=True, outputs=("entropy",)),
        Case("strided", strided=True, bias=True),
        Case("vocab-order", vocab_order=True, bias=True, outputs=("prediction",), spec=_small("none")),
        Case("frozen-e", wanted=("c",)),
        Case("frozen-c", wanted=("e",)),
        Case("only-bias", bias=True, wanted=("bias",)),
        Case("everything", k=3, bias=True, softcap=4.0, logit_scale=1.5, outputs=EVERYTHING, logit_weight=True, m=50),
    ]


def _filtered() -> list[Case]:
    """Cases with tiles that are really skipped; the kit asserts that they are."""
    base = Case("filtered", n=42, d=24, v=800, data="peaked", bias=True, spec=_FILTERED)
    ordered = replace(base, n=90, vocab_order=True)  # so many, for a tile of any entries to be skipped
    return [
        base,
        replace(base, name="filtered-uncompensated", spec={**_FILTERED, "compensate": False}),
        replace(base, name="filtered-mass", spec=_MASS),
        replace(base, name="filtered-mass-uncompensated", spec={**_MASS, "compensate": False}),
        replace(base, name="filtered-natural-rows", spec={**_FILTERED, "row_order": "natural", "block_n": 4}),
        replace(base, name="filtered-single-rows", spec={**_FILTERED, "block_n": 1}),
        replace(base, name="filtered-odd-blocks", spec={**_FILTERED, "block_n": 7, "block_v": 50}),
        replace(base, name="filtered-big-blocks", n=300, v=1500, spec={**_FILTERED, "block_n": 128, "block_v": 128}),
        replace(base, name="filtered-online", spec={**_FILTERED, "lse_accumulation": "online"}),
        replace(base, name="filtered-small-scratch", d=80, v=1500, spec={**_FILTERED, "scratch_bytes": 2**16}),
        replace(base, name="filtered-softcap", softcap=6.0),
        replace(base, name="filtered-scale", logit_scale=1.3),
        replace(base, name="filtered-entropy", outputs=("entropy",)),
        replace(base, name="filtered-entropy-softcap", outputs=("entropy", "prediction"), softcap=6.0),
        replace(base, name="filtered-mean-logit", outputs=("weighted_logit",), logit_weight=True),
        replace(base, name="filtered-capped-weights", outputs=("weighted_logit",), softcap=6.0),
        replace(base, name="filtered-soft-targets", k=3),
        replace(ordered, name="filtered-order"),
        replace(ordered, name="filtered-order-windows", spec={**_FILTERED, "scratch_bytes": 2**16}),
        replace(base, name="filtered-rows-left-out", m=65),
        replace(base, name="filtered-frozen-e", wanted=("c",)),
        replace(base, name="filtered-frozen-c", wanted=("e",)),
        replace(base, name="filtered-masked-low", data="masked_low", outputs=("entropy",)),
        replace(base, name="filtered-masked-high", data="masked_high"),
        replace(base, name="filtered-everything", k=2, m=50, outputs=("entropy", "weighted_logit"), vocab_order=True),
    ]


def _offsets() -> list[Case]:
    """Logits that share an offset of a thousand to a hundred million; tokens whose target is nearly certain."""
    plain = Case("offset", v=130, d=9, outputs=("entropy",), spec=_small("none"))
    by_bias: dict[str, Any] = {"bias": True, "offset_by": "bias"}
    few = {**_FILTERED, "block_v": 64, "threshold": 2.0**-7}
    filtered = Case("offset-filtered", n=45, d=24, v=800, data="peaked", offset=2.0**13, spec=few)
    return [
        replace(plain, name="offset-1e3", offset=2.0**10),
        replace(plain, name="offset-1e4", offset=2.0**13, bias=True, outputs=("weighted_logit",)),
        replace(plain, name="offset-1e6", offset=2.0**20, k=2),
        replace(plain, name="offset-1e8", offset=2.0**27),
        replace(plain, name="offset-negative", offset=-(2.0**17), bias=True, outputs=("entropy", "prediction")),
        replace(plain, name="offset-bias-1e3", offset=2.0**10, logit_scale=0.5, **by_bias),
        replace(plain, name="offset-bias-1e8", offset=2.0**27, **by_bias),
        replace(plain, name="offset-loss", offset=2.0**17, outputs=()),
        replace(plain, name="offset-loss-soft-targets", offset=2.0**20, k=3, outputs=(), **by_bias),
        replace(plain, name="offset-certain", offset=2.0**13, data="certain"),
        replace(plain, name="offset-certain-loss", offset=2.0**20, data="certain", outputs=()),
        replace(plain, name="certain-loss", data="certain", outputs=()),
        replace(plain, name="offset-weights", offset=2.0**20, outputs=("weighted_logit",), logit_weight=True),
        replace(plain, name="offset-online", offset=2.0**17, spec={**_small("none"), "lse_accumulation": "online"}),
        replace(plain, name="offset-bfloat16", offset=2.0**13, e_dtype=BF16, c_dtype=BF16),
        replace(plain, name="offset-float16", offset=2.0**13, e_dtype=F16, c_dtype=F16, outputs=()),
        replace(plain, name="offset-float64", offset=2.0**40, e_dtype=F64, c_dtype=F64, bias=True),
        filtered,
        replace(
            filtered,
            name="offset-filtered-mass",
            spec={**few, "filter": "tile", "threshold": 2.0**-4},
            vocab_order=True,
        ),
        replace(filtered, name="offset-filtered-bias", offset=2.0**17, outputs=("entropy",), **by_bias),
        replace(filtered, name="offset-filtered-bfloat16", e_dtype=BF16, c_dtype=BF16),
    ]


def _small(filter: str) -> dict[str, Any]:
    return {"filter": filter, "block_n": 16, "block_v": 32}


def _dtypes() -> list[Case]:
    """A plain, a filtered and a full case in each dtype, and mixed ones."""
    plain = Case("plain", n=100, d=48, v=515, bias=True)
    filtered = Case("filtered", n=42, d=24, v=800, data="peaked", bias=True, spec=_FILTERED)
    full = Case("full", k=2, bias=True, softcap=4.0, outputs=EVERYTHING)
    cases = [case.of(dtype) for case in (plain, filtered, full) for dtype in (BF16, F16, F64)]
    cases += [
        replace(plain, name="mixed-bf16-f32", e_dtype=BF16),
        replace(plain, name="mixed-f32-bf16", c_dtype=BF16),
        replace(filtered, name="mixed-f16-bf16-filtered", e_dtype=F16, c_dtype=BF16),
        replace(plain, name="default-spec-bf16", data="peaked", e_dtype=BF16, c_dtype=BF16, v=2000, spec=_DEFAULT),
        replace(plain, name="float64-sums", spec={"filter": "none", "accumulate": "float64"}),
    ]
    return cases


CASES: tuple[Case, ...] = (*_shapes(), *_options(), *_offsets(), *_filtered(), *_dtypes())
