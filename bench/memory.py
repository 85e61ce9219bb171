"""Peak memory of a call on a CPU: the kernel's own high-water mark of this process, reset before the call (Linux)."""

import ctypes
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_resident_over(function: Callable) -> int | None:
    """Bytes by which the resident set grew at most during function(); None where /proc does not tell."""
    try:
        _return_free_memory()
        _CLEAR.write_text("5")  # sets VmHWM to the present resident set
        before = _field("VmRSS")
    except (OSError, AttributeError):
        return None
    function()
    return max(0, _field("VmHWM") - before)


def _return_free_memory() -> None:
    """What malloc keeps for later would hide the next allocation."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _field(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
