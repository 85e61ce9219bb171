"""malloc's settings, in processes of their own: they are a process's for good."""

import os
import platform
import subprocess
import sys

import pytest

from heiretsu.run import cpu_memory

PROGRAM = """
import torch
from heiretsu.run.cpu_memory import keep_freed_memory
def rss(): return int(open("/proc/self/statm").read().split()[1]) * 4096
kept = keep_freed_memory()
before = rss()
x = torch.ones(64 * 2**20, dtype=torch.float32)
del x
print(kept, rss() - before > 200 * 2**20)
"""


def run(**environment) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_what_is_freed_stays_with_the_process():
    assert run() == "True True\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
@pytest.mark.parametrize("refused", [None, cpu_memory._M_MMAP_MAX, cpu_memory._M_TRIM_THRESHOLD])
def test_nothing_is_mapped_and_the_heap_is_never_trimmed(monkeypatch, refused):
    """malloc.h: M_MMAP_MAX is -4 and M_TRIM_THRESHOLD -1, whose value -1 is never; mallopt gives 1 where it did it."""
    asked = {}

    class Libc:
        def mallopt(self, setting, value):
            asked[setting] = value
            return int(setting != refused)

    monkeypatch.setattr(cpu_memory.ctypes, "CDLL", lambda name: Libc())
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    assert cpu_memory.keep_freed_memory() is (refused is None)
    assert asked == {-4: 0, -1: -1} if refused != -4 else {-4: 0}


def test_settings_of_the_user_stay():
    assert run(MALLOC_ARENA_MAX="4") == "False False\n"
