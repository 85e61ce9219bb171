"""Is it right? The kernels compiled for this device, held to the rules that they are held to everywhere else.

rows: the parity table, op by op and dtype by dtype, by many processes that compile at once; then every launch that
ships; then each row twenty times over, and with one pipeline stage. Scratch memory is poisoned throughout. large:
offsets beyond 2**31 elements. sanitizer: a few rows under compute-sanitizer's memcheck and racecheck.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

import torch

from heiretsu.bench.gpu_kit import large, rehearsal, shipped
from heiretsu.bench.gpu_kit.kit import LONG_S, Item, Kit
from heiretsu.kernels import fused
from heiretsu.kernels.gpu import launch
from heiretsu.offgpu.scratch import poisoned_scratch
from tests.kernels import forms
from tests.kernels.cases import all_cases
from tests.kernels.parity import Case, check, compare, dtype_name, run, same_bits

LAUNCHES = 20
DTYPE_ORDER = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
SANITIZERS = ("memcheck", "racecheck")


def items(kit: Kit, group: str) -> list[Item]:
    if forms.INTERPRETED:
        from heiretsu.offgpu.interpreter import watch

        watch()
    return {"rows": row_items, "large": large_items, "sanitizer": sanitizer_items}[group](kit)


def rows(rehearse: bool) -> list[tuple[Case, torch.dtype]]:
    """The whole table, bfloat16 first; in a rehearsal its first tiny rows of each op."""
    table = [(case, dtype) for dtype in DTYPE_ORDER for case in all_cases() if dtype in case.dtypes]
    if rehearse:
        tiny = [row for row in table if row[0].emulate and row[1] == torch.bfloat16]
        smallest = {row[0].op: row for row in sorted(tiny, key=size_of, reverse=True)}
        return list(smallest.values())
    return table


def size_of(row: tuple[Case, torch.dtype]) -> int:
    inputs = row[0].inputs(torch.Generator().manual_seed(0), row[1])
    return sum(x.numel() for x in inputs.values() if isinstance(x, torch.Tensor))


def name_of(case: Case, dtype: torch.dtype) -> str:
    return f"{case.op}/{case.name}/{dtype_name(dtype)}"


def row_items(kit: Kit) -> list[Item]:
    table = rows(kit.rehearse)
    arch = launch.architecture(kit.torch_device)
    launches = [(case, dtype) for case in shipped.cases(arch) for dtype in case.dtypes]
    if kit.rehearse:
        launches = [(case, dtype) for case, dtype in launches if dtype == torch.bfloat16][::5]
    found = [Item(f"row {name_of(*row)}", functools.partial(parity, kit, *row)) for row in table]
    found += [Item("what ships", lambda: kit.fact("shipped launches", shipped.every_title(arch)))]
    found += [Item(f"shipped {name_of(*row)}", functools.partial(ships, kit, *row)) for row in launches]
    found += [
        Item(f"again {name_of(*row)}", functools.partial(again, kit, *row))
        for row in table[: 1 if kit.rehearse else None]
    ]
    return found


def op_of(case: Case):
    return getattr(fused, case.op)


def parity(kit: Kit, case: Case, dtype: torch.dtype) -> None:
    with poisoned_scratch():
        check(case, dtype, op_of(case), kit.torch_device)
    kit.check(True)


def ships(kit: Kit, case: Case, dtype: torch.dtype) -> None:
    with poisoned_scratch():
        entries = shipped.launched_by(case, lambda case: check(case, dtype, op_of(case), kit.torch_device))
    kit.check(True, launched=entries)


def again(kit: Kit, case: Case, dtype: torch.dtype) -> None:
    """The same launch twenty times, bit for bit: a race shows here. Then with one stage: no pipelining, same result."""
    device = kit.torch_device
    with poisoned_scratch():
        first = run(case, dtype, op_of(case), device)
        for count in range(1, 2 if kit.rehearse else LAUNCHES):
            other = run(case, dtype, op_of(case), device)
            different = [name for name in first if not same_bits(first[name], other[name])]
            assert not different, f"launch {count + 1} gives other bits than the first in {', '.join(different)}"
        with launch.override(num_stages=1):
            one_stage = run(case, dtype, op_of(case), device)
    for name, tensor in one_stage.items():
        if tensor is not None and first[name] is not None:
            message = compare(tensor, first[name], first[name]).message
            assert not message, f"num_stages=1 against the shipped number, {name}: {message}"
    kit.check(True)


def large_items(kit: Kit) -> list[Item]:
    span = large.REHEARSED_SPAN if kit.rehearse else large.SPAN
    arch = launch.architecture(kit.torch_device)
    found = [
        Item(f"whole {whole.op}: {whole.why}", _judged(kit, functools.partial(large.check_whole, kit, whole)))
        for whole in large.wholes(span)
    ]
    for op in ("expert_mlp", "linear_cross_entropy"):
        found.append(Item(f"large weights {op}", _judged(kit, functools.partial(large.check_large_weights, kit, op))))
    far = large.far_checks(shipped.cases(arch), torch.bfloat16)
    for case, name, dim in far[:: 8 if kit.rehearse else 1]:
        task = functools.partial(large.check_far, kit, case, torch.bfloat16, name, dim)
        found.append(Item(f"far {case.op} {name} dim {dim}", _judged(kit, task)))
    return found


def _judged(kit: Kit, task):
    def run_and_say():
        try:
            task()
        finally:
            kit.device.release_memory()
        kit.check(True)

    return run_and_say


def sanitizer_items(kit: Kit) -> list[Item]:
    """The rows are those that the emulator runs: tiny, because a sanitized launch takes a hundred times as long."""
    if kit.rehearse:
        command = rehearsal.stand_in_sanitizer(kit.scratch)
    elif path := shutil.which("compute-sanitizer"):
        command = [path]
    else:
        return [Item("compute-sanitizer", lambda: kit.absent("compute-sanitizer", "it is not on the path"))]
    return [
        Item(f"compute-sanitizer {tool}", functools.partial(sanitize, kit, command, tool), LONG_S)
        for tool in SANITIZERS[: 1 if kit.rehearse else None]
    ]


def sanitize(kit: Kit, command: list[str], tool: str) -> None:
    words = [*command, "--tool", tool, "--error-exitcode", "86", "--print-limit", "5"]
    words += [kit.python, "-m", "heiretsu.bench.gpu_kit.sanitized", str(kit.torch_device), str(int(kit.rehearse))]
    environment = kit.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1", TRITON_ALWAYS_COMPILE="0")
    limit = max(10.0, kit.seconds_left())
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        count = str(late.stdout or b"").count("row ")
        kit.absent(f"the rest of {tool}", f"out of time after {limit:.0f} s: {count} rows were done, without an error")
        return
    text = done.stdout + done.stderr
    print(text)
    clean, problem = verdict(text, done.returncode)
    if clean is None:
        last = (text.strip().splitlines() or ["it said nothing"])[-1]
        kit.absent(f"compute-sanitizer {tool}", f"it does not work on this machine: {last[:200]}")
        return
    kit.check(clean, problem, rows=text.count("row "))


def verdict(text: str, status: int) -> tuple[bool | None, str]:
    """(whether the tool found nothing, what it found); None where it did not work. Each tool has its own words."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    if summary is None or "Device not supported" in text:
        return None, ""
    if status == 0 and summary[1] == "0":
        return True, ""
    said = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    return False, f"status {status}: " + " | ".join(line for line in said if line)[:1500]
