"""Clipped policy gradients on per-token log-probabilities (PPO, GRPO, DAPO), with entropy terms.

``e`` is (..., L, D); ``targets`` (..., L) are the sampled tokens, with ``ignore_index`` at prompts and padding. Tensors
that come from an earlier call have the shape of the results, that of ``targets[..., shift:]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cce.frontend import checks
from cce.losses.call import Call, Options
from cce.losses.values import check_log_prob

if TYPE_CHECKING:
    from typing_extensions import Unpack

REDUCTIONS = (*checks.REDUCTIONS, "sequence")


def ppo(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    advantages: Tensor,
    old_log_prob: Tensor | None = None,
    clip: float = 0.2,
    clip_high: float | None = None,
    entropy_coefficient: float = 0.0,
    top_entropy: float = 1.0,
    ref_log_prob: Tensor | None = None,
    kl_coefficient: float = 0.0,
    reduction: str = "mean",
    token_weight: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Clipped policy gradient: with r the ratio of a token's new to its old probability and A its advantage,

    ``-min(r A, clip(r, 1 - clip, 1 + clip_high) A) - entropy_coefficient H + kl_coefficient KL``.

    Args:
        e, c, targets: (..., L, D), (V, D), (..., L).
        advantages: advantages A, in the results' shape, or one per sequence (without L). Differentiable.
        old_log_prob: log-probabilities under the sampling policy, at most 0, in the results' shape: its
            ``-cce.terms(...).nll``. None means the policy of this call, for one update per sample: r is 1, and its
            gradient is that of ``log p``.
        clip, clip_high: bounds of the clipping, at least 0; ``clip_high=None`` means ``clip``. DAPO uses 0.2 and 0.28.
        entropy_coefficient: coefficient of the entropy H of the softmax; a positive one keeps it high. Its gradient
            needs every logit, so ``spec`` must not have a filter.
        top_entropy: share rho in (0, 1]: only the tokens with the largest H, this share of the call's tokens, have the
            clipped term; the mean is still over all (Wang et al., who use 0.2).
        ref_log_prob: log-probabilities under a reference policy, in the results' shape.
        kl_coefficient: coefficient of the estimate ``exp(d) - d - 1``, d = ref_log_prob - log p, of the KL divergence
            from the reference policy; at least 0.
        reduction: as for :func:`cce.loss`, or "sequence": the mean of each sequence, averaged over the sequences.
        token_weight: as :func:`cce.loss`.
        **options: :class:`Options`; ``logit_scale=1 / T`` for tokens sampled at temperature T.

    Returns:
        Tensor: a scalar, or with "none" one value per token. Values at ignored tokens are never used.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`cce.loss`; a tensor has another shape, a number is outside
            its range above, log-probabilities are above 0 (on a GPU as for targets), or only one of ``ref_log_prob``
            and ``kl_coefficient`` is given.

    Source: Schulman et al., Proximal Policy Optimization Algorithms, arXiv 1707.06347, equations 7 and 9; Yu et al.,
        DAPO, arXiv 2503.14476 (clip_high, mean over tokens); Wang et al., Beyond the 80/20 Rule, arXiv 2506.01939
        (top_entropy); Shao et al., DeepSeekMath, arXiv 2402.03300, equation 4 (KL).

    >>> ppo(torch.eye(3), torch.eye(3), torch.tensor([0, 1, 2]), advantages=torch.ones(3))
    tensor(-1.)
    """
    call = Call.of(e, c, targets, options, reduction=reduction, token_weight=token_weight, reductions=REDUCTIONS)
    clip_high = clip if clip_high is None else clip_high
    _check(clip, clip_high, entropy_coefficient, top_entropy, kl_coefficient, ref_log_prob)
    nll, entropy = _nll_and_entropy(call, wanted=bool(entropy_coefficient), ranked=top_entropy < 1)
    log_prob, in_use = -nll, call.in_use
    a = _beside(log_prob, in_use, "advantages", advantages, of_sequence=True)
    old = log_prob.detach()
    if old_log_prob is not None:
        old = _log_prob_beside(log_prob, in_use, "old_log_prob", old_log_prob)
    value = _clipped(log_prob - old, a, 1 - clip, 1 + clip_high)
    if entropy is not None and top_entropy < 1:
        value = value.masked_fill(~_among_largest(entropy.detach(), in_use, top_entropy), 0)
    if entropy is not None and entropy_coefficient:
        value = value - entropy_coefficient * entropy
    if ref_log_prob is not None:
        d = _log_prob_beside(log_prob, in_use, "ref_log_prob", ref_log_prob) - log_prob
        value = value + kl_coefficient * (torch.expm1(d) - d)
    return call.reduce(value)


def grpo(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    *,
    rewards: Tensor,
    group_size: int,
    reduction: str = "sequence",
    **options: Any,
) -> Tensor:
    """Group relative policy optimization: :func:`ppo` with :func:`group_advantages`, averaged by sequence.

    Args:
        e, c, targets: (B, L, D), (V, D), (B, L), with the samples of each prompt consecutive.
        rewards: (B,) rewards of the samples. A sample without tokens in use counts in its group's mean, unless its
            reward is NaN.
        group_size: number of samples per prompt.
        reduction: "sequence", as published, or "mean", DAPO's mean over tokens.
        **options: those of :func:`ppo` but ``advantages``.

    Returns:
        Tensor: as :func:`ppo`.

    Raises:
        TypeError, ValueError, BackendUnavailable: as :func:`ppo` and :func:`group_advantages`.

    Source: Shao et al., DeepSeekMath, arXiv 2402.03300, equation 3.

    >>> e, rewards = torch.eye(4).view(2, 2, 4), torch.tensor([1.0, 0.0])
    >>> grpo(e, torch.eye(4), torch.tensor([[0, 1], [2, -100]]), rewards=rewards, group_size=2).abs() < 1e-6
    tensor(True)
    """
    if "advantages" in options:
        raise TypeError("advantages: got a value, expected none: they are made from rewards")
    missing = _ignored_and_nan(rewards, targets, options)
    advantages = _group_advantages(rewards, missing, group_size=group_size, normalize=True, epsilon=1e-6)
    return ppo(e, c, targets, advantages=advantages, reduction=reduction, **options)


def group_advantages(rewards: Tensor, *, group_size: int, normalize: bool = True, epsilon: float = 1e-6) -> Tensor:
    """Advantages ``(reward - mean) / (std + epsilon)`` within each group of samples.

    Args:
        rewards: (B,) floating, with the samples of each prompt consecutive.
        group_size: number of samples per prompt; divides B.
        normalize: False subtracts the mean only (Dr. GRPO, arXiv 2503.20783).
        epsilon: number added to the standard deviation, above 0.

    Returns:
        Tensor: (B,) advantages, one per sequence, in float32 (float64 for float64 rewards). A NaN reward makes all
            advantages of its group NaN.

    Raises:
        TypeError, ValueError: rewards have another shape or dtype, or a number is outside its range above.

    Source: Shao et al., DeepSeekMath, arXiv 2402.03300, section 4.1.2. The standard deviation is the sample's (n - 1).

    >>> group_advantages(torch.tensor([1.0, 0.0, 3.0, 1.0]), group_size=2, normalize=False)
    tensor([ 0.5000, -0.5000,  1.0000, -1.0000])
    """
    return _group_advantages(rewards, None, group_size=group_size, normalize=normalize, epsilon=epsilon)


def _group_advantages(
    rewards: Tensor, missing: Tensor | None, *, group_size: int, normalize: bool, epsilon: float
) -> Tensor:
    """Compute ``group_advantages`` without the rewards that are ``missing`` (B,), whose advantage is 0."""
    checks.check_count("group_size", group_size)
    checks.check_number("epsilon", epsilon, "a finite number > 0", lambda x: x > 0)
    checks.check_bool("normalize", normalize)
    checks.check_float_tensor("rewards", rewards)
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards: got shape {tuple(rewards.shape)}, expected (B,) with B a multiple of group_size={group_size}"
        )
    if normalize and group_size < 2:
        raise ValueError(f"group_size: got {group_size}, expected at least 2 samples to normalize")
    groups = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).reshape(-1, group_size)
    out = torch.zeros_like(groups, dtype=torch.bool) if missing is None else missing.reshape(-1, group_size)
    number = (~out).sum(1, keepdim=True)
    mean = groups.masked_fill(out, 0).sum(1, keepdim=True) / number.clamp(min=1)
    centred = (groups - mean).masked_fill(out, 0)
    if normalize:
        variance = centred.square().sum(1, keepdim=True) / (number - 1).clamp(min=1)
        same = variance == 0  # avoid the gradient of its root, which is infinite there
        centred = centred / (variance.masked_fill(same, 1).sqrt().masked_fill(same, 0) + epsilon)
    return centred.reshape(-1)


def _ignored_and_nan(rewards: Any, targets: Any, options: Any) -> Tensor | None:
    """Mask (B,) of sequences with a NaN reward and no token in use; None for arguments that ``ppo`` will refuse."""
    if not isinstance(rewards, Tensor) or not isinstance(targets, Tensor):
        return None
    if targets.ndim != 2 or rewards.shape != targets.shape[:1] or rewards.device != targets.device:
        return None
    ignore_index, shift = options.get("ignore_index", -100), options.get("shift", 0)
    if not all(isinstance(x, (int, torch.SymInt)) for x in (ignore_index, shift)):
        return None
    return rewards.isnan() & (targets[:, max(shift, 0) :].to(torch.int64) == ignore_index).all(1)


def _check(
    clip: float,
    clip_high: float,
    entropy_coefficient: float,
    top_entropy: float,
    kl_coefficient: float,
    ref_log_prob: Tensor | None,
) -> None:
    for name, value in (("clip", clip), ("clip_high", clip_high), ("kl_coefficient", kl_coefficient)):
        checks.check_number(name, value, "a finite number >= 0", lambda x: x >= 0)
    checks.check_number("entropy_coefficient", entropy_coefficient, "a finite number", lambda x: True)
    checks.check_number("top_entropy", top_entropy, "a number in (0, 1]", lambda x: 0 < x <= 1)
    if kl_coefficient and ref_log_prob is None:
        raise ValueError(f"ref_log_prob: got None with kl_coefficient={kl_coefficient}, expected log-probabilities")
    if ref_log_prob is not None and not kl_coefficient:
        raise ValueError("kl_coefficient: got 0 with ref_log_prob, expected a number > 0")


def _nll_and_entropy(call: Call, *, wanted: bool, ranked: bool) -> tuple[Tensor, Tensor | None]:
    """Loss and entropy of every token; the entropy has a gradient if ``wanted``, and serves for ranks if ``ranked``."""
    if wanted or (ranked and not call.filtered):
        out = call.terms("nll", "entropy")
        assert out.nll is not None
        return out.nll, out.entropy
    entropy = None
    if ranked:  # a separate pass without gradients: a filter has none for the entropy, and none is needed
        with torch.no_grad():
            entropy = call.terms("entropy").entropy
    return call.nll(), entropy


def _clipped(log_ratio: Tensor, a: Tensor, low: float, high: float) -> Tensor:
    """Return ``-min(r a, clip(r, low, high) a)``.

    r may overflow where it does not count, being clipped or having an advantage of 0: it is dropped before the product.
    """
    r = log_ratio.detach().exp()
    fixed = ((r > high) & (a >= 0)) | ((r < low) & (a <= 0))
    return -a * torch.where(fixed, r.clamp(low, high), log_ratio.masked_fill(fixed, 0).exp())


def _log_prob_beside(log_prob: Tensor, in_use: Tensor, name: str, x: Any) -> Tensor:
    """Apply ``_beside`` to log-probabilities, after checking them."""
    found = _beside(log_prob, in_use, name, x)
    check_log_prob(name, found, x.dtype)
    return found


def _beside(log_prob: Tensor, in_use: Tensor, name: str, x: Any, *, of_sequence: bool = False) -> Tensor:
    """Bring ``x`` to the results' shape and dtype, 0 at ignored tokens; or one number per sequence, if allowed."""
    if of_sequence and isinstance(x, Tensor) and x.shape == log_prob.shape[:-1] != log_prob.shape:
        x = x[..., None].expand(log_prob.shape)
    checks.check_floats(name, x, tuple(log_prob.shape), "the results' shape", log_prob)
    return x.to(log_prob.dtype).masked_fill(~in_use, 0)


def _among_largest(entropy: Tensor, in_use: Tensor, share: float) -> Tensor:
    """Mask of tokens whose entropy is at least the (``share`` N)-th largest; nothing waits for a GPU."""
    if not entropy.numel():
        return in_use
    ranked = entropy.flatten().sort(descending=True).values  # ignored tokens have 0, and come last
    # Count in exact millionths: 0.1 * 30 is 3, where floating point may give a little more and round up to 4.
    k = (in_use.sum() * round(share * 10**6) + 10**6 - 1) // 10**6
    threshold = ranked.gather(0, (k - 1).clamp(min=0)[None])
    return ~(entropy < threshold) & in_use  # a NaN is kept, so that it is visible
