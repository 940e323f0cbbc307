"""Checks of the public arguments: every error names the argument, the value and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cce import registry
from cce.errors import describe
from cce.spec import Spec

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
#: Taken as targets, too, though PyTorch has few operations for them: they are converted before anything else.
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
REDUCTIONS = ("mean", "sum", "none")
OUTPUTS = ("nll", "lse", "entropy", "prediction")


def check_tensors(e: Any, c: Any, targets: Any, bias: Any, target_weight: Any, part: bool = False) -> None:
    """Check types, dtypes, shapes and devices of the tensors; their values are not looked at.

    ``part``: ``c`` is a part of the vocabulary, which may be empty.
    """
    _float_tensor("e", e)
    _float_tensor("c", c)
    _tensor("targets", targets)
    if targets.dtype not in (*INTEGERS, *UNSIGNED):
        raise TypeError(f"targets: got dtype {targets.dtype}, expected an integer dtype (soft targets: target_weight)")
    if e.ndim < 1:
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected (..., D)")
    if c.ndim != 2 or c.shape[0] < (0 if part else 1) or c.shape[1] < 1:
        raise ValueError(f"c: got shape {tuple(c.shape)}, expected (V, D) with V >= 1 and D >= 1")
    if e.shape[-1] != c.shape[1]:
        raise ValueError(f"e: got shape {tuple(e.shape)}, expected (..., {c.shape[1]}) to match c's {tuple(c.shape)}")
    _target_shapes(e, targets, target_weight)
    if bias is not None:
        _float_tensor("bias", bias)
        _shape("bias", bias, (c.shape[0],), "(V,)")
    _same_device(e.device, c=c, targets=targets, bias=bias, target_weight=target_weight)


def check_options(*, ignore_index: Any, shift: Any, softcap: Any, logit_scale: Any, backend: Any, spec: Any) -> None:
    """Check the options that ``terms`` and ``loss`` share."""
    check_ignore_index(ignore_index)
    _integer("shift", shift)
    if shift < 0:
        raise ValueError(f"shift: got {shift}, expected an int >= 0")
    if softcap is not None:
        _number("softcap", softcap, "None or a finite number > 0", lambda x: x > 0)
    _number("logit_scale", logit_scale, "a finite number > 0", lambda x: x > 0)
    if not torch.compiler.is_compiling():  # the operator looks the name up again when it runs
        registry.check_name(backend)
    if spec is not None and not isinstance(spec, Spec):
        raise TypeError(f"spec: got {describe(spec)}, expected a cce.Spec or None")


def check_range(wide: torch.dtype, **numbers: float | None) -> None:
    """Check that the dtype a call computes in can hold these numbers, neither as inf nor as 0."""
    if wide == torch.float64:
        return
    limits = torch.finfo(wide)
    for name, value in numbers.items():
        if value is not None and not limits.tiny <= value <= limits.max:
            expected = f"a number from {limits.tiny:.3g} to {limits.max:.3g}, as {wide} holds it"
            raise ValueError(f"{name}: got {value!r}, expected {expected}")


def check_ignore_index(ignore_index: Any) -> None:
    """Check the value that a target may have beside an entry."""
    _integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: got {ignore_index}, expected an int of at most 64 bits")


def check_shift(shift: int, targets: Tensor, lead: int) -> None:
    """Check ``shift``, which moves along the last of the ``lead`` leading dimensions."""
    if shift and lead < 1:
        raise ValueError(
            f"shift: got {shift} with targets of shape {tuple(targets.shape)}, expected a sequence dimension"
        )


def check_vocab_order(spec: Spec, v: int) -> None:
    """Check that a vocabulary order has an entry for every row of ``c``."""
    order = spec.permutation
    if order is not None and len(order) != v:
        raise ValueError(f"spec.vocab_order: got {len(order)} entries, expected V = {v}")


def check_vocab_order_options(v: Any, every: Any, decay: Any) -> None:
    """Check the numbers that a ``VocabOrder`` is made with."""
    check_count("v", v)
    check_count("every", every)
    _number("decay", decay, "a number in (0, 1]", lambda x: 0 < x <= 1)


def check_counts(name: str, counts: Any, v: int, *, dtypes: tuple[torch.dtype, ...] = (*FLOATS, *INTEGERS)) -> None:
    """Check (V,) counts to sort a vocabulary by; a GPU's values are not looked at, as that would wait for it."""
    _tensor(name, counts)
    if counts.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {counts.dtype}, expected one of {expected}")
    _shape(name, counts, (v,), "(V,)")
    if counts.is_meta:
        raise ValueError(f"{name}: got a tensor on {counts.device}, expected one with values")
    if counts.device.type == "cpu":
        bad = ~((counts >= 0) & (counts < torch.inf))
        if bool(bad.any()):
            where = int(bad.nonzero()[0])
            raise ValueError(f"{name}: got {counts[where].item()} at index {where}, expected finite values >= 0")


def check_vocab_order_state(state: Any, v: int) -> None:
    """Check a state of ``VocabOrder.state_dict``, of ``v`` entries."""
    names = ("counts", "permutation", "updates")
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict: got {describe(state)}, expected a dict")
    if set(state) != set(names):
        raise ValueError(f"state_dict: got the keys {sorted(map(str, state))}, expected {sorted(names)}")
    check_counts("state_dict['counts']", state["counts"], v)
    _integer("state_dict['updates']", state["updates"])
    if state["updates"] < 0:
        raise ValueError(f"state_dict['updates']: got {state['updates']}, expected an int >= 0")
    order = state["permutation"]
    _tensor("state_dict['permutation']", order)
    _shape("state_dict['permutation']", order, (v,), "(V,)")
    if order.dtype != torch.int64:
        raise TypeError(f"state_dict['permutation']: got dtype {order.dtype}, expected int64")
    if not torch.equal(order.sort().values, torch.arange(v, device=order.device)):
        raise ValueError(f"state_dict['permutation']: got {order}, expected a permutation of range({v})")


def check_integers(name: str, value: Any, *, dtypes: tuple[torch.dtype, ...] = INTEGERS) -> None:
    """Check for an integer tensor of any shape."""
    _tensor(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {value.dtype}, expected an integer dtype")


def check_outputs(outputs: Any) -> None:
    """Check names of ``terms``' outputs."""
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise TypeError(f"outputs: got {describe(outputs)}, expected a sequence of names out of {OUTPUTS}")
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs:
        raise ValueError(f"outputs: got {tuple(outputs)!r}, expected one or more of {OUTPUTS}")


def check_loss_options(
    *,
    reduction: Any,
    label_smoothing: Any,
    z_loss: Any,
    weight: Any,
    token_weight: Any,
    v: int | None,
    lead: torch.Size,
    device: torch.device,
) -> None:
    """Check the options of ``loss`` that ``terms`` does not have.

    Args:
        reduction, label_smoothing, z_loss, weight, token_weight: as given to ``loss``.
        v: entries of the whole vocabulary, None if unknown.
        lead: shape of one value a token.
        device: of the call.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    _number("label_smoothing", label_smoothing, "a number in [0, 1]", lambda x: 0 <= x <= 1)
    _number("z_loss", z_loss, "a finite number >= 0", lambda x: x >= 0)
    check_class_weight(weight, v)
    _same_device(device, weight=weight)
    check_token_weight(token_weight, lead, device)


def check_token_weight(token_weight: Any, lead: torch.Size, device: torch.device) -> None:
    """Check for one weight a token, or None."""
    if token_weight is None:
        return
    _tensor("token_weight", token_weight)
    if token_weight.dtype not in (*FLOATS, *INTEGERS, torch.bool):
        raise TypeError(f"token_weight: got dtype {token_weight.dtype}, expected a real dtype or bool")
    _shape("token_weight", token_weight, tuple(lead), "one weight a token")
    _same_device(device, token_weight=token_weight)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Check for one of some names."""
    if not isinstance(value, str) or value not in choices:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{name}: got {describe(value)}, expected one of {choices}")


def check_number(name: str, value: Any, expected: str, valid: Callable[[Any], bool]) -> None:
    """Check for a finite number of which ``valid`` is true."""
    _number(name, value, expected, valid)


def check_count(name: str, value: Any) -> None:
    """Check for an int of at least 1."""
    _integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: got {value}, expected an int >= 1")


def check_bool(name: str, value: Any) -> None:
    """Check for True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {describe(value)}, expected True or False")


def check_float_tensor(name: str, value: Any) -> None:
    """Check for a tensor of real numbers of any shape."""
    _float_tensor(name, value)


def check_floats(name: str, value: Any, shape: tuple[int, ...], meaning: str, like: Tensor) -> None:
    """Check for a tensor of real numbers, of this shape and on the device of ``like``."""
    _float_tensor(name, value)
    _shape(name, value, shape, meaning)
    _same_device(like.device, **{name: value})


def check_entries(name: str, value: Any, targets: Tensor) -> None:
    """Check (..., K) vocabulary entries beside ``targets`` (...)."""
    check_integers(name, value, dtypes=(*INTEGERS, *UNSIGNED))
    if value.ndim != targets.ndim + 1 or value.shape[:-1] != targets.shape or value.shape[-1] < 1:
        expected = (*targets.shape, "K")
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected} with K >= 1")
    _same_device(targets.device, **{name: value})


def check_option_names(options: Mapping[str, Any], accepted: Iterable[str]) -> None:
    """Check keywords that a function passes on."""
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise TypeError(f"{unknown[0]}: got {options[unknown[0]]!r}, expected an option out of {sorted(accepted)}")


def check_class_weight(weight: Any, v: int | None) -> None:
    """Check (V,) class weights, or None; ``v`` None stands for a vocabulary of unknown size."""
    if weight is None:
        return
    _float_tensor("weight", weight)
    _shape("weight", weight, (weight.numel() if v is None else v,), "(V,)")
    if weight.requires_grad:
        raise ValueError("weight: got a tensor that requires grad, expected class weights without (detach it)")


def check_head(in_features: Any, out_features: Any, dtype: Any) -> None:
    """Check the sizes and the dtype of ``LinearCrossEntropy``."""
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: got {dtype!r}, expected one of {FLOATS} or None")
    check_count("in_features", in_features)
    check_count("out_features", out_features)


def _target_shapes(e: Tensor, targets: Tensor, target_weight: Any) -> None:
    lead = tuple(e.shape[:-1])
    if target_weight is None:
        _shape("targets", targets, lead, "e's leading shape")
        return
    _float_tensor("target_weight", target_weight)
    if targets.ndim != e.ndim or tuple(targets.shape[:-1]) != lead or targets.shape[-1] < 1:
        raise ValueError(
            f"targets: got shape {tuple(targets.shape)}, expected {(*lead, 'K')} with K >= 1, as target_weight is given"
        )
    _shape("target_weight", target_weight, tuple(targets.shape), "targets' shape")


def _tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {describe(value)}, expected a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, expected a dense (strided) tensor")
    if hasattr(value, "full_tensor"):  # asked this way, torch.distributed.tensor need not be imported
        raise TypeError(
            f"{name}: got a DTensor of shape {tuple(value.shape)}, expected a plain tensor, all of it on this rank: "
            "its full_tensor()"
        )


def _float_tensor(name: str, value: Any) -> None:
    _tensor(name, value)
    if value.dtype not in FLOATS:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise TypeError(f"{name}: got dtype {value.dtype}, expected one of {expected}")


def _shape(name: str, value: Tensor, expected: tuple[Any, ...], meaning: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {expected}, {meaning}")


def _same_device(device: torch.device, **others: Any) -> None:
    for name, value in others.items():
        if value is not None and value.device != device:
            raise ValueError(f"{name}: got device {value.device}, expected {device}, where the others are")


def _integer(name: str, value: Any) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {describe(value)}, expected an int")


def _number(name: str, value: Any, expected: str, valid: Any) -> None:
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {describe(value)}, expected {expected}")
    # math.isfinite would break a compiled graph, and raise on an int beyond the floats.
    if not -sys.float_info.max <= value <= sys.float_info.max or not valid(value):
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
