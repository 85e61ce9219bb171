"""malloc's settings, in processes of their own: they are a process's for good."""

import os
import platform
import subprocess
import sys

import pytest

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


def test_settings_of_the_user_stay():
    assert run(MALLOC_ARENA_MAX="4") == "False False\n"
