"""The front end's work on targets in one kernel: the launches of separate operations would take longer."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["v", "ignore_index", "size"])
def targets_kernel(targets, out, v, ignore_index, size, BLOCK: tl.constexpr):
    """Write out int64 = targets, with -1 for ``ignore_index``; any other outside [0, v) is a device-side assertion.

    It must be launched with ``debug=True``: without it, Triton leaves assertions out.
    """
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
        where = start + tl.arange(0, BLOCK)
        inside = where < size
        target = tl.load(targets + where, mask=inside, other=0).to(tl.int64)
        ignored = target == ignore_index
        counts = (target >= 0) & (target < v)
        tl.device_assert(counts | ignored, "cce: a target outside [0, V) that is not ignore_index", mask=inside)
        tl.store(out + where, tl.where(counts & (ignored == 0), target, -1), mask=inside)


@triton.jit(do_not_specialize=["v", "ignore_index", "size"])
def mean_targets_kernel(targets, out, weights, v, ignore_index, size, BLOCK: tl.constexpr):
    """Write out like ``targets_kernel``; weights = 1 / (number of targets that are not -1) for these, 0 for the others.

    It runs as one program, launched with ``debug=True``.
    """
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        where = start + tl.arange(0, BLOCK)
        inside = where < size
        target = tl.load(targets + where, mask=inside, other=0).to(tl.int64)
        ignored = target == ignore_index
        counts = (target >= 0) & (target < v)
        tl.device_assert(counts | ignored, "cce: a target outside [0, V) that is not ignore_index", mask=inside)
        counts = counts & (ignored == 0)
        tl.store(out + where, tl.where(counts, target, -1), mask=inside)
        total += (counts & inside).to(tl.int32)
    count = tl.sum(total, 0).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        where = start + tl.arange(0, BLOCK)
        target = tl.load(targets + where, mask=where < size, other=0).to(tl.int64)
        used = ((target >= 0) & (target < v) & (target != ignore_index)).to(tl.float32)
        tl.store(weights + where, tl.div_rn(used, count), mask=where < size)
