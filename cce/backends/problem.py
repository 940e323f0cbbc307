"""The metadata of one call, and the arrays that travel between the front end and a backend.

The array classes are generic: the kernels fill them with torch tensors, the reference with NumPy arrays.
Symbols are those of docs/design.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from cce.spec import Spec

A = TypeVar("A")

#: ``Maps.tile_mass`` holds the mass of a tile that the row hits negated, and at least this large: the smallest float16.
LEAST_HIT = 2.0**-24

#: Outputs a backend computes only on request, besides ``lse`` and ``nll``.
EXTRA_OUTPUTS = ("entropy", "weighted_logit", "prediction")


@dataclass(frozen=True)
class Problem:
    """Metadata of one call: everything a backend needs to decide whether it can run the call.

    Args:
        n: rows of ``e`` in use (ignored rows are already left out).
        v, d: rows and columns of ``c``.
        k: target entries per row; 1 for ordinary targets.
        e_dtype, c_dtype: dtypes of ``e`` and ``c``.
        device: device type, "cpu", "cuda", ...
        bias: whether a bias is added to the logits.
        softcap, logit_scale: ``z = softcap * tanh(logit_scale * (e c^T + bias) / softcap)``, -inf where the bias is.
        outputs: requested members of ``EXTRA_OUTPUTS``.
        grad_e, grad_c, grad_bias: whether the gradient will be requested.
        part: whether ``c`` is only a part of the vocabulary, so that dE is one of several terms of a sum.
    """

    n: int
    v: int
    d: int
    k: int = 1
    e_dtype: torch.dtype = torch.float32
    c_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    outputs: frozenset[str] = frozenset()
    grad_e: bool = False
    grad_c: bool = False
    grad_bias: bool = False
    part: bool = False

    @classmethod
    def of(
        cls,
        e: torch.Tensor,
        c: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
        logit_scale: float,
        outputs: str,
        grads: str,
    ) -> Problem:
        """The metadata of these tensors: targets (N, K), the others as in :class:`Inputs`.

        ``outputs`` and ``grads`` are comma-separated names, as the operators take them: members of ``EXTRA_OUTPUTS``,
        and of "e", "c", "bias".
        """
        names = set(grads.split(","))
        return cls(
            n=targets.shape[0],
            v=c.shape[0],
            d=c.shape[1],
            k=targets.shape[1],
            e_dtype=e.dtype,
            c_dtype=c.dtype,
            device=e.device.type,
            bias=bias is not None,
            softcap=softcap,
            logit_scale=logit_scale,
            outputs=frozenset(outputs.split(",")) & frozenset(EXTRA_OUTPUTS),
            grad_e="e" in names,
            grad_c="c" in names,
            grad_bias="bias" in names,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors of the products: the wider of those of ``e`` and ``c``."""
        return torch.promote_types(self.e_dtype, self.c_dtype)

    @property
    def de_dtype(self) -> torch.dtype:
        """Dtype of dE: that of ``e``, or at least float32 if dE is one of several terms of a sum."""
        return torch.promote_types(self.e_dtype, torch.float32) if self.part else self.e_dtype

    @property
    def needs_grad(self) -> bool:
        return self.grad_e or self.grad_c or self.grad_bias

    def maps(self, spec: Spec) -> frozenset[str]:
        """The fields of :class:`Maps` that the backward of a resolved ``spec`` reads."""
        if not self.needs_grad or spec.filter == "none":
            return frozenset()
        entropy = spec.compensate and "entropy" in self.outputs
        return frozenset({"tile_mass", "tile_entropy"} if entropy else {"tile_mass"})

    def map_dtype(self, spec: Spec) -> torch.dtype:
        """Dtype of the maps: float16 where the products' factors have 16 bits, else the accumulation dtype.

        The values a map replaces would be rounded to 16 bits themselves, and the maps are much of the memory beyond the
        gradients. Their values lie in [0, 1] (entropies: [0, log BLOCK_V]), where float16 is finer than bfloat16.
        """
        half = self.dtype in (torch.bfloat16, torch.float16) and spec.accumulate == "float32"
        return torch.float16 if half else getattr(torch, str(spec.accumulate))


@dataclass(frozen=True)
class Inputs(Generic[A]):
    """Arrays that a backend reads in both passes.

    Attributes:
        e: (M, D), any strides.
        c: (V, D), any strides.
        targets: (N, K) int64, vocabulary entries; -1 stands for no target.
        bias: (V,) or None.
        rows: (N,) int64, ascending: row i of the problem is ``e[rows[i]]``. None when N = M.
        logit_weight: (V,) weights u of ``weighted_logit``; None stands for 1 / V.
        vocab_order: (V,) int64 permutation, or None for the natural order.
        in_use: (N,) bool, the rows that count, where these are more than the rows with a target: ``c`` is then a part
            of the vocabulary, and other parts hold the other targets. Only for backends with ``skips_ignored_rows``.
    """

    e: A
    c: A
    targets: A
    bias: A | None = None
    rows: A | None = None
    logit_weight: A | None = None
    vocab_order: A | None = None
    in_use: A | None = None


@dataclass(frozen=True)
class Outputs(Generic[A]):
    """Outputs of the forward for each row of the problem, in the accumulation dtype.

    Only differences of logits count, and all logits of a row may share an offset at which float32 holds few digits of
    a difference. So the log-sum-exp is a pair of numbers, and the backend computes ``nll`` instead of leaving the
    subtraction to the caller.

    Attributes:
        lse: (N,) log-sum-exp of the row's logits; -inf where all are -inf.
        nll: (N, K) ``lse_i - z[i, targets[i, k]]``, from differences to the row's largest logit; at least 0, and 0
            where the target is -1. NaN where lse is -inf or inf.
        lse_low: (N,) rounding error of ``lse``, so that ``p = exp((z - lse) - lse_low)``; NaN where ``lse`` is not
            finite, as there is no softmax. None stands for 0.
        entropy: (N,) entropy of the softmax in nats; never negative.
        weighted_logit: (N,) ``sum_v u_v z[i, v]``, in float64 where the device has it.
        prediction: (N,) int64, the vocabulary entry of the largest logit, the first in the vocabulary order if tied.
    """

    lse: A
    nll: A
    lse_low: A | None = None
    entropy: A | None = None
    weighted_logit: A | None = None
    prediction: A | None = None


@dataclass(frozen=True)
class Maps(Generic[A]):
    """Values of each tile that the forward keeps for the backward; (T, N) each, None where not in :meth:`Problem.maps`.

    Attributes:
        tile_mass: the row's probability in vocabulary block t, ``exp(tile_lse - lse)``; negated, and at least
            ``LEAST_HIT``, where the filter's rule says that the row needs the block.
        tile_entropy: entropy of the row's softmax restricted to the block.
    """

    tile_mass: A | None = None
    tile_entropy: A | None = None


@dataclass(frozen=True)
class Upstream(Generic[A]):
    """Gradients of the caller's loss, in the accumulation dtype.

    With p the softmax and H the entropy of a row,
    ``dz[i, j] = p_ij (a_i + h_i (lse_i - H_i - z_ij)) - sum_k g_ik [j = targets_ik] + s_i u_j``.

    Attributes:
        a: (N,) gradient of ``lse``, plus the sum of ``g`` over k, since every ``nll_ik`` contains ``lse_i``.
        g: (N, K) gradient of ``nll``.
        h: (N,) gradient of ``entropy``, or None.
        s: (N,) gradient of ``weighted_logit``, or None.
    """

    a: A
    g: A
    h: A | None = None
    s: A | None = None


@dataclass(frozen=True)
class Gradients(Generic[A]):
    """Gradients returned by the backward; None where not requested.

    Attributes:
        de: (N, D), in :attr:`Problem.de_dtype` or the accumulation dtype.
        dc: (V, D), in ``c``'s dtype.
        dbias: (V,), in the accumulation dtype.
    """

    de: A | None = None
    dc: A | None = None
    dbias: A | None = None
