"""Triton's interpreter, watched while it runs.

The interpreter runs a kernel on NumPy, one program of the grid after the other; heiretsu.kernels mends it where it
computes something else than a GPU. `watch` makes an int32 overflow an error; `sanitizer` finds what running in order
on one big memory hides. All of it reaches into `triton.runtime.interpreter`, whose internals are the same in Triton 3.6
to 3.9 as far as used here.
"""

from heiretsu.offgpu.interpreter import overflow


def watch() -> None:
    """Once in this process, before a kernel runs. TRITON_INTERPRET=1 must be set by then."""
    overflow.install()
