"""glibc's malloc on a training run: keep what a step frees, because the next step asks for the same again."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let this process's malloc take large blocks from its heap, and never shrink that; True if it does.

    By default each tensor of more than 32 MiB is mapped from the system and unmapped when it is freed, and the system
    clears its pages anew at the first touch: on two cores a third of a step with a large vocabulary. Only glibc has
    these settings; where the user has set some (MALLOC_... in the environment) theirs stay.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never
