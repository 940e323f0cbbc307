"""Copies of a matrix's rows in another order: those of ``e`` for the work list, those of ``c`` for a window."""

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    x, index, keep, out, rows, D, stride_row, stride_d,
    KEEP: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write out [rows, D] = x[index]; with KEEP, zeros where ``keep[index]`` is 0, whatever x holds there."""
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    row = tl.load(index + tl.minimum(place, rows - 1)).to(tl.int64)
    inside = (place < rows)[:, None]
    if not EVEN_D:
        inside = inside & (d < D)[None, :]
    inside = tl.broadcast_to(inside, (BLOCK_R, BLOCK_D))
    counts = inside
    if KEEP:
        counts = counts & (tl.load(keep + row) != 0)[:, None]
    values = tl.load(x + row[:, None] * stride_row + d[None, :] * stride_d, mask=counts, other=0.0)
    tl.store(out + place.to(tl.int64)[:, None] * D + d[None, :], values, mask=inside)
