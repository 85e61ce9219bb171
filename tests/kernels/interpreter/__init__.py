"""Triton's interpreter, mended where it computes something else than a GPU, and watched while it runs.

The interpreter runs a kernel on NumPy, one program of the grid after the other. `mend` makes bfloat16 right, an int32
overflow an error and calls of device functions quick; `sanitizer` finds what running in order on one big memory
hides. All of it reaches into `triton.runtime.interpreter`, whose internals are the same in Triton 3.6 to 3.9 as far
as used here.
"""

from tests.kernels.interpreter import bfloat16, launches, overflow


def mend() -> None:
    """Mend the interpreter of this process, once, before a kernel runs. TRITON_INTERPRET=1 must be set by then."""
    bfloat16.install()
    overflow.install()
    launches.install()
