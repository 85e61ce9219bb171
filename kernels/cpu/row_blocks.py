"""Blocks of rows that stay in the cache: what the CPU forms over rows (bias_gelu, layer_norm, dropout) share.

A bf16 activation costs ATen either slow mixed-dtype loops or float32 copies of the whole tensor; so a block of rows is
widened to float32, worked on in place and narrowed again, and the only traffic is reading the input and writing the
output.

While torch.compile traces (torch.compiler.is_compiling()), such an op is its formula instead: Inductor fuses that into
one pass itself, and better than anything opaque to it.
"""

# Elements of a block. Four float32 blocks of 2**17 are 2 MiB, the L2 caches of two cores; smaller ones pay more for
# calling ATen than they save (measured 2**14 to 2**20: 2**17 and 2**18 best with 1 and with 2 threads).
BLOCK_ELEMENTS = 1 << 17


def block_rows(row_elements):
    """Rows of a block."""
    return max(1, BLOCK_ELEMENTS // max(1, row_elements))


def row_blocks(rows, row_elements):
    """Slices over 0..rows, a block each."""
    return slices(rows, block_rows(row_elements))


def slices(total, step):
    """0..total in slices of `step`, the last one shorter."""
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
