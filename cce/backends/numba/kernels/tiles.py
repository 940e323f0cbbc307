"""A tile of a matrix product: panels from global into shared memory, and from there into the matrix unit.

Sizes, blocks and steps are named as in the kernels of the other backends; ``Tile`` describes a thread's elements.
"""

from functools import cache

from cce.backends.numba.device import SIMULATED, barrier, copies_commit, copies_wait, copy_16, function
from cce.backends.numba.kernels.multiply import make_multiply
from cce.backends.numba.tile import PANEL, PIECE, PIECES


@function
def spot(panel, row, piece):
    """Address of 16 bytes of a panel: pieces of a row are swizzled, so that those of 8 rows lie in all banks."""
    return panel + PANEL * row + PIECE * (piece ^ (row & 7))


@cache
def make_load_panel(rows, threads):
    """Make the function that starts the copies of a panel of so many rows."""
    step = threads // PIECES
    copies = rows // step

    @function
    def load_panel(panel, matrix, row_starts, piece0, pieces, thread):
        """Start copying one piece of each of ``copies`` rows; row_starts[n]: start of the row, -1: zeros."""
        row, piece = thread >> 3, thread & 7
        inside = piece0 + piece < pieces
        for n in range(copies):
            start = row_starts[n]
            copy_16(spot(panel, row + n * step, piece), matrix, start + piece0 + piece, inside and start >= 0)

    return load_panel, copies


@cache
def make_step(tile, b_offset, a_transposed=False, b_transposed=False):
    """Make a step of a pipeline: z += a b^T for the panels of a stage, b's ``b_offset`` bytes after a's.

    Return four functions. ``arrived()`` waits for the stage's copies, of all threads. After ``start(z, stage,
    thread)``, copies may be started, ``ahead`` stages on; then comes ``multiply(z, stage, thread)``. With ``mma.sync``
    the product is in ``multiply``; Hopper's unit is started by ``start``, and works asynchronously. ``finish(z)``
    completes z.
    """
    wait = copies_wait[tile.ahead - 1]
    if tile.hopper and not SIMULATED:
        return make_hopper_step(tile, wait, b_offset, a_transposed, b_transposed)
    product = make_multiply(tile, a_transposed, b_transposed)

    @function
    def arrived():
        wait()
        barrier()  # all are done with the previous stage, too

    @function
    def start(z, stage, thread):
        return

    @function
    def multiply(z, stage, thread):
        product(z, stage, stage + b_offset, thread)

    @function
    def finish(z):
        return

    return arrived, start, multiply, finish


def make_hopper_step(tile, wait, b_offset, a_transposed, b_transposed):
    """Variant of ``make_step`` for the matrix unit that reads shared memory itself."""
    from cce.backends.numba import wgmma

    fence_copies, panel_descriptor, finish_but_one = wgmma.fence_copies, wgmma.panel_descriptor, wgmma.finish_but_one
    start_product = wgmma.start_product(tile.columns, tile.kind, a_transposed, b_transposed)
    # Four warps work together on 64 rows; transposed, these form a panel of their own.
    QUARTER = PANEL * (tile.depth if a_transposed else 64)

    @function
    def arrived():
        wait()
        fence_copies()
        barrier()

    @function
    def start(z, stage, thread):
        start_product(z, panel_descriptor(stage + (thread >> 7) * QUARTER), panel_descriptor(stage + b_offset))

    @function
    def multiply(z, stage, thread):
        finish_but_one()  # once all pass the next ``arrived``, copies may overwrite the previous stage

    return arrived, start, multiply, wgmma.finish_products(tile.columns)


@cache
def make_logit_tile(tile):
    """Make ``begin`` and ``product`` for rows of e and of c; also return the copies of each that a thread makes."""
    load_e, e_copies = make_load_panel(tile.rows, tile.threads)
    load_c, c_copies = make_load_panel(tile.columns, tile.threads)
    STAGES, AHEAD, STAGE, E_BYTES = tile.stages, tile.ahead, tile.stage_bytes, PANEL * tile.rows
    arrived, start, multiply, finish = make_step(tile, E_BYTES)

    @function
    def load(stage, step, e, c, e_rows, c_rows, pieces, thread):
        """Start the copies of panel ``step`` of both factors, if there is one; always form one group of copies."""
        if step * PIECES < pieces:
            load_e(stage, e, e_rows, step * PIECES, pieces, thread)
            load_c(stage + E_BYTES, c, c_rows, step * PIECES, pieces, thread)
        copies_commit()

    @function
    def begin(shared, e, c, e_rows, c_rows, pieces, thread):
        """Start the copies of the first panels. No thread may still be reading others."""
        for step in range(AHEAD):
            load(shared + step * STAGE, step, e, c, e_rows, c_rows, pieces, thread)

    @function
    def product(z, shared, e, c, e_rows, c_rows, pieces, thread):
        """Compute z += e c^T, after ``begin``; at the end all panels are free."""
        now, later = 0, AHEAD
        for step in range((pieces + PIECES - 1) // PIECES):
            arrived()
            start(z, shared + now * STAGE, thread)
            load(shared + later * STAGE, step + AHEAD, e, c, e_rows, c_rows, pieces, thread)
            multiply(z, shared + now * STAGE, thread)
            now = now + 1 if now + 1 < STAGES else 0
            later = later + 1 if later + 1 < STAGES else 0
        finish(z)
        barrier()

    return begin, product, e_copies, c_copies
