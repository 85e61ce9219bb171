"""What stands in for a GPU in a rehearsal, so that every line of the kit runs once before it runs on a rented machine.

Tensors are on the CPU, sizes tiny, events read the CPU's clock. `right` runs the Triton kernels in the interpreter,
`proof` compiles for an H100 and lets the emulator be the device, `fast` and `train` run the CPU forms, and
torch.compile takes its eager backend. No figure of a rehearsal means anything.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from heiretsu.bench.gpu_kit.device import Device

NAME = "no GPU: a rehearsal"
CAPABILITY = (9, 0)
FLUSH_BYTES = 4096


def device() -> Device:
    return Device(stand_in(), torch.device("cpu"), FLUSH_BYTES)


def stand_in() -> SimpleNamespace:
    """With the functions of torch.cuda that the kit uses."""
    return SimpleNamespace(
        Event=_Event,
        synchronize=lambda *_: None,
        get_device_properties=lambda _: SimpleNamespace(name=NAME, total_memory=2**30, multi_processor_count=1),
        get_device_capability=lambda _: CAPABILITY,
        mem_get_info=lambda *_: (2**28, 2**30),
        empty_cache=lambda: None,
        device_count=lambda: 2,
        set_sync_debug_mode=lambda mode: None,
    )


class _Event:
    def __init__(self, enable_timing: bool = False):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return max(1e3 * (end.at - self.at), 1e-3)


def install() -> None:
    """One thread, and a torch.compile that costs nothing: the machine is shared, and its speed is not the question."""
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="eager")


@contextlib.contextmanager
def compiling_driver(launches: bool = False):
    """Inside, Triton compiles for an H100, and a launch does nothing, or with `launches` goes to the emulator.

    A loaded kernel's registers and spills are those of its machine code, as a real driver would tell them.
    """
    from heiretsu.offgpu.audit.disassembly import disassemble
    from heiretsu.offgpu.emulator import installed

    with installed(target=10 * CAPABILITY[0] + CAPABILITY[1]) as driver:

        def load_binary(name, binary, shared, device):
            program = disassemble(binary)
            spilled = (program.stack_bytes + program.local_bytes) // 4
            return None, object(), program.registers, spilled, 1024

        driver.utils.load_binary = load_binary
        if not launches:
            driver._launch = lambda *_: None
        yield driver


def run_script(
    folder: Path, command: list[str], env: dict[str, str], timeout: float, **_
) -> subprocess.CompletedProcess:
    """subprocess.run of a Python script, in a process that has imported torch already: seconds less of a shared CPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "heiretsu.run.building", "heiretsu.kernels.fused"])
    output = folder / "script.txt"
    process = context.Process(target=_script, args=(command[1:], env, output))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, process.exitcode, output.read_text(), "")


def _script(argv: list[str], environment: dict[str, str], output: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def stand_in_sanitizer(folder: Path) -> list[str]:
    """A command that runs a program as compute-sanitizer does, and finds nothing."""
    script = folder / "sanitizer.py"
    script.write_text(
        "import subprocess, sys\n"
        "command = sys.argv[1:]\n"
        "while command[0].startswith('--'):\n"
        "    command = command[2:]\n"
        "status = subprocess.run(command).returncode\n"
        "print('========= ERROR SUMMARY: 0 errors')\n"
        "sys.exit(status)\n"
    )
    return [sys.executable, str(script)]
