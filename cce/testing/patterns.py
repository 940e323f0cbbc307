"""Places of NaN and infinities in the results of calls with such values, against the definition.

A NaN that spreads further than in the definition costs a whole step, one that does not arrive hides a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cce import registry
from cce.backends.resolve import resolve
from cce.reference.roundoff import LAMBDA
from cce.testing.check_option import differentiate, make_upstream, near, run_option, widened
from cce.testing.definition import dense
from cce.testing.options import BF16, F16, FILTERED, Option, make_data

_INF, _NAN, _UNIT = torch.inf, torch.nan, 2.0**-24
#: Tokens: one in use, one with a lasting place among the ignored.
_USED, _IGNORED = (0, 2), (1, 4)

Values = dict[str, Tensor]


def _at(name: str, where: tuple[int, ...] | int, value: float) -> Callable[[Values, Values], None]:
    def put(data: Values, upstream: Values) -> None:
        data[name][where] = value

    return put


def nan_behind_ignored(data: Values, upstream: Values) -> None:
    """An ignored token may hold and get anything: it costs nothing."""
    data["e"][_IGNORED] = _NAN
    for name in {"token_weight", "target_weight"} & set(data):
        data[name][_IGNORED] = _NAN
    for x in upstream.values():
        if x.ndim:
            x[_IGNORED] = _NAN


def masked(data: Values, upstream: Values) -> None:
    """Entries that are masked, whole tiles of them too; no target is one."""
    bias = data["bias"]
    bias[::3] = -_INF
    bias[16:48] = -_INF
    allowed = (bias > -_INF).nonzero()[:, 0]
    t = data["targets"]
    t.copy_(torch.where(t < 0, t, allowed[t.clamp(min=0) % len(allowed)]))


def masked_and_large(data: Values, upstream: Values) -> None:
    """Masked entries, and upstream gradients that a large finite stand-in for their logits would make infinite."""
    masked(data, upstream)
    for x in upstream.values():
        x.mul_(2.0**10)


def masked_weightless(data: Values, upstream: Values) -> None:
    """Masked entries whose class weighs 0, which times their infinite logit is NaN."""
    masked(data, upstream)
    data["weight"][data["bias"] == -_INF] = 0


def masked_target(data: Values, upstream: Values) -> None:
    """A token whose target is masked: its loss is infinite, its gradients are not."""
    masked(data, upstream)
    data["targets"][_USED] = 17


def all_masked(data: Values, upstream: Values) -> None:
    """No entry is left: there is no softmax."""
    data["bias"].fill_(-_INF)


def masked_and_nan(data: Values, upstream: Values) -> None:
    """A token without values reaches the masked entries too."""
    masked(data, upstream)
    data["e"][_USED] = _NAN


def nan_upstream(data: Values, upstream: Values) -> None:
    """The gradient of one token's outputs is NaN."""
    for x in upstream.values():
        x[_USED if x.ndim else ()] = _NAN


def infinite_upstream(data: Values, upstream: Values) -> None:
    """The gradient of one token's outputs is infinite."""
    for x in upstream.values():
        x[_USED if x.ndim else ()] = _INF


def last_upstream(data: Values, upstream: Values) -> None:
    """NaN in the gradient of one output, of several, for one token."""
    x = upstream[list(upstream)[-1]]
    x[_USED if x.ndim else ()] = _NAN


def saturated(data: Values, upstream: Values) -> None:
    """Logits far apart, and exact: probabilities of 0 and 1 in float32, for some tokens that of the target is 0."""
    e, c, bias, t = (data[name] for name in ("e", "c", "bias", "targets"))
    e.mul_(40).round_()
    for x in (c, bias):
        x.mul_(8).round_().div_(8)
    best = (e.float() @ c.float().T + bias.float()).argmax(-1)
    best = best if t.ndim == best.ndim else best[..., None].expand(t.shape)
    wrong = torch.arange(t.shape[1], device=t.device).view(-1, *(1,) * (t.ndim - 2)) % 3 == 0
    t.copy_(torch.where((t < 0) | wrong, t, best))


def near_overflow(data: Values, upstream: Values) -> None:
    """Logits, and differences of them, of half the largest number of float32; or far above that of float16."""
    e, c = data["e"], data["c"]
    e[..., 1:], c[:, 1:] = 0, 0
    of_e, of_c = (8, 10) if e.dtype == F16 else (100, 25)
    e[..., 0] = 2.0**of_e
    c[:, 0] = 2.0**of_c * torch.linspace(1, 4, len(c), device=c.device)


Poke = Callable[[Values, Values], None]
POKES: dict[str, Poke] = {
    "nothing": lambda data, upstream: None,
    "NaN in a row of e": _at("e", (*_USED, 3), _NAN),
    "inf in a row of e": _at("e", (*_USED, 3), _INF),
    "-inf in a row of e": _at("e", (*_USED, 3), -_INF),
    "NaN in a row of c": _at("c", (40, 3), _NAN),
    "inf in a row of c": _at("c", (40, 3), _INF),
    "NaN in the bias": _at("bias", 40, _NAN),
    "inf in the bias": _at("bias", 40, _INF),
    "masked entries": masked,
    "masked entries, large upstream": masked_and_large,
    "masked target": masked_target,
    "all entries masked": all_masked,
    "masked entries and a NaN row": masked_and_nan,
    "masked entries without weight": masked_weightless,
    "NaN behind ignored tokens": nan_behind_ignored,
    "NaN upstream": nan_upstream,
    "inf upstream": infinite_upstream,
    "NaN upstream of one output": last_upstream,
    "saturated": saturated,
    "near overflow": near_overflow,
}


#: Sums in another order, or in parts, have NaN where the definition has an infinity.
_UNSIGNED = ("inf upstream", "inf in a row of c")
#: The gradient of an ignored token's e is 0, or 0 times such a row, which is NaN: PyTorch's dense step has the latter.
_IN_C = ("NaN in a row of c", "inf in a row of c")
_NONE = {"reduction": "none"}
CALLS = {
    "mean": Option("mean", tensors=("bias",)),
    "none": Option("none", _NONE, ("bias", "token_weight")),
    "smoothing": Option("smoothing", {**_NONE, "label_smoothing": 0.2}, ("bias", "weight")),
    "soft targets": Option("soft targets", _NONE, ("bias", "token_weight", "target_weight")),
    "terms": Option("terms", tensors=("bias",), outputs=("nll", "lse", "entropy")),
    "capped": Option("capped", {"softcap": 3.0}, ("bias",), ("nll", "lse", "entropy")),
    "element": Option("element", _NONE, ("bias",), spec=FILTERED, tolerance=2e-2),
    "element, uncompensated": Option(
        "element, uncompensated", _NONE, ("bias",), spec={**FILTERED, "compensate": False}, tolerance=0.1
    ),
    "tile": Option("tile", _NONE, ("bias",), spec={**FILTERED, "filter": "tile"}, tolerance=2e-2),
    "float16": Option("float16", _NONE, ("bias",), e_dtype=F16, c_dtype=F16, tolerance=5e-3),
    "bfloat16, filtered": Option(
        "bfloat16, filtered", _NONE, ("bias",), e_dtype=BF16, c_dtype=BF16, spec=FILTERED, tolerance=2e-2
    ),
}  # fmt: skip

#: Of each call, what its own kernels may get wrong.
_SHORT = {
    "mean": ("inf in a row of e", "masked target", "all entries masked", "NaN behind ignored tokens", "NaN upstream"),
    "none": ("-inf in a row of e", "masked entries and a NaN row", "NaN behind ignored tokens", "near overflow"),
    "smoothing": ("masked entries", "masked entries without weight"),
    "soft targets": ("masked target",),
    "terms": (
        "inf in the bias",
        "all entries masked",
        "masked entries, large upstream",
        "saturated",
        "NaN upstream of one output",
    ),
    "capped": ("masked target", "masked entries and a NaN row"),
    "element": ("masked target", "NaN upstream", "near overflow"),
    "element, uncompensated": ("NaN in a row of e", "NaN in a row of c", "all entries masked", "inf upstream"),
    "tile": ("masked entries and a NaN row",),
    "float16": ("saturated", "near overflow", "NaN upstream"),
    "bfloat16, filtered": ("inf in a row of e", "near overflow"),
}


@dataclass(frozen=True)
class Pattern:
    """A call and what is done to its values before: keys of ``CALLS`` and ``POKES``."""

    call: str
    poke: str

    def __str__(self) -> str:
        return f"{self.call}, {self.poke}"

    @property
    def short(self) -> bool:
        """It is one of those for an interpreter, which takes seconds for each."""
        return self.poke in _SHORT.get(self.call, ())


def _patterns() -> list[Pattern]:
    found = []
    for call, option in CALLS.items():
        filtered = option.spec["filter"] != "none"
        for poke in POKES:
            if poke == "masked entries without weight" and "weight" not in option.tensors:
                continue
            if poke == "NaN upstream of one output" and len(option.outputs) < 2:
                continue
            # A sum of losses may overflow float32 where their mean does not.
            if poke == "near overflow" and call == "mean":
                continue
            # A logit of -inf is no reason to compute a tile, so the product of its p = 0 and inf may be left out.
            if poke == "inf in a row of c" and filtered:
                continue
            found.append(Pattern(call, poke))
    return found


PATTERNS: tuple[Pattern, ...] = tuple(_patterns())


def check_pattern(pattern: Pattern, backend: str, device: str) -> list[str]:
    """Outputs and gradients: NaN, inf and -inf where the definition has them, and its values elsewhere.

    Returns:
        The backend's reasons, if it refuses the call.

    Raises:
        AssertionError: a difference.
    """
    option = CALLS[pattern.call]
    problem = option.problem(device)
    reasons = registry.reasons(backend, problem, resolve(option.make_spec(), problem))
    if reasons:
        return reasons
    given = make_data(option, device)
    data = {name: x.detach().clone() for name, x in given.items()}
    upstream = make_upstream(dense(option.call, given, option.outputs))
    POKES[pattern.poke](data, upstream)
    data = {name: x.requires_grad_(given[name].requires_grad) for name, x in data.items()}
    outputs = run_option(option, data, backend, option.make_spec())
    found = {**outputs, **differentiate(outputs, data, upstream)}
    wide = widened(option, data)
    expected = dense(option.call, wide, option.outputs)
    expected |= differentiate(expected, wide, upstream)
    for name, x in expected.items():
        got = found[name]
        if name == "e" and pattern.poke in _IN_C:
            used = (data["targets"] != -100).view(*got.shape[:2], -1).any(-1)
            got, x = got[used], x[used]
        # A log-sum-exp errs by the rounding of a sum of V terms, and an output may be as small as that.
        least = LAMBDA * _UNIT * (problem.v * x.numel()) ** 0.5 if name in outputs else 0.0
        _compare(name, got, x, (option.tolerance, least), signs=pattern.poke not in _UNSIGNED)
    return []


def _compare(name: str, found: Tensor, expected: Tensor, tolerance: tuple[float, float], signs: bool) -> None:
    """``tolerance`` is relative and absolute; ``signs``: NaN, inf and -inf are three things, else one."""
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    kinds = (
        {"NaN": torch.isnan, "inf": torch.isposinf, "-inf": torch.isneginf} if signs else {"not finite": _not_finite}
    )
    as_stored = expected.to(found.dtype)
    for kind, test in kinds.items():
        differ = test(found) != test(as_stored)
        if bool(differ.any()):
            where = tuple(differ.nonzero()[0].tolist())
            raise AssertionError(
                f"{name}: {kind} in {int(test(found).sum())} places, expected in {int(test(as_stored).sum())} of "
                f"{found.numel()}; first at {where}: {float(found[where])}, expected {float(expected[where])}"
            )
    finite = as_stored.isfinite()
    relative, absolute = tolerance
    near(name, found[finite], expected[finite], relative, size=absolute / relative)


def _not_finite(x: Tensor) -> Tensor:
    return ~x.isfinite()
