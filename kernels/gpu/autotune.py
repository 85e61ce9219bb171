"""Launch parameters measured on this GPU, for the shapes of one run: what `train.py --autotune` does before it trains.

The tiles that ship are derived from what the compiler makes of a kernel, for a whole class of GPUs; a clock knows more
about one of them. For each entry that a call launches, the table's parameters (those that ship) and a pruned few others
are timed in the call's forward and backward pass, one entry after the other. Another one is taken only if it is faster
by more than the noise, twice, and computes what the table's computes. Each step is said, the time is bounded, and what
was found is kept on disk, where the next run of the same shapes, GPU, Triton and kernel sources finds it.

A choice changes tiles, and so the order of summation inside a kernel: the last bits of a result may differ from those
of a run that chose otherwise. Two runs with the same choices give the same bits, as ever.

Most of the time goes to the compiler: about 60 candidates of the bf16 kernels for an H100 took it 0.4 to 5 s each,
ahead of time, and all fit. We had no GPU to run this on: its tests replace the clock, and launch on the emulator. What
it gains is not known.
"""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from heiretsu.kernels.agreement import disagreements
from heiretsu.kernels.control import CONTROL
from heiretsu.kernels.gpu.autotune_cache import Cache, cache_file
from heiretsu.kernels.gpu.launch import Entry
from heiretsu.kernels.recording import recording

Run = Callable[[], Mapping[str, torch.Tensor]]  # a call's forward and backward: every output and gradient, by name

# Not for speed alone: they decide how large a buffer is, or how many partial sums are added outside of the kernel.
FIXED = ("ROWS", "SPLIT_V", "BUFFER_ELEMENTS")
CLASSES_OF_A_KIND = ("ampere", "hopper", "blackwell")  # each may learn from the others' entries; cdna3 has other units
NOISE = 0.02  # of the time: what differs by less is taken to be equal
REORDERED = 1e-5  # of a tensor's largest element: what other tiles, and so another order of sums, may change in float32


def candidates(entry: Entry) -> list[dict]:
    """The table's parameters first, then the few worth a try: at most 7 in all.

    They are what other architectures of the kind use, one pipeline stage more or less where any of them has a pipeline,
    and half or double the warps, between 4 and 16.
    """
    table, archs = entry.parameters, entry.tiles.rows[entry.row]
    kind = CLASSES_OF_A_KIND if entry.arch in CLASSES_OF_A_KIND else (entry.arch,)
    others = [archs[arch][entry.size] for arch in kind if entry.size in archs.get(arch, ())]
    stages, warps = table["num_stages"], table["num_warps"]
    if any(other["num_stages"] > 1 for other in others):
        others += [table | {"num_stages": count} for count in (stages - 1, stages + 1) if count >= 1]
    others += [table | {"num_warps": count} for count in (warps // 2, warps * 2) if 4 <= count <= 16]
    found = [dict(table)]
    for other in others:
        if other not in found and all(other.get(name) == table.get(name) for name in FIXED):
            found.append(dict(other))
    return found


def milliseconds(run: Run) -> float:
    """Median time of a call, with a cold L2 cache."""
    return triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")


def _print(line: str) -> None:
    print(line, flush=True)


def tune(
    calls: Mapping[str, Callable[[], Run]], device: torch.device, path: Path | None = None,
    clock: Callable[[Run], float] = milliseconds, say: Callable[[str], None] = _print, seconds: float = 120.0,
) -> dict[Entry, dict]:  # fmt: skip
    """Choose the parameters of every entry that the calls launch; from here on, launches of this process use them.

    calls: {op, shapes and dtype in words: a function that makes the inputs and returns the Run}. An entry that several
    of them launch is tuned in the first. path: of the cache, `cache_file()` unless given. clock: milliseconds of a Run.
    seconds: no candidate is begun after so many; what is left keeps the table's parameters, and the next run goes on
    there. Returns the choices, to put into another process's `CONTROL.chosen`.
    """
    CONTROL.chosen.clear()
    cache = Cache(path or cache_file(), device, say)
    chosen: dict[Entry, dict] = {}
    todo: dict[Entry, str] = {}  # and the call to tune it in
    for call, prepare in calls.items():
        with recording() as record:
            prepare()()
        for entry in record.entries:
            if entry in chosen or entry in todo:
                continue
            if known := cache.get(call, entry, candidates(entry)):
                chosen[entry] = known
            else:
                todo[entry] = call
    CONTROL.chosen.update(chosen)
    if chosen:
        changed = {_title(e): _difference(e, p) for e, p in chosen.items() if p != candidates(e)[0]}
        words = "".join(f"; {title} with {difference}" for title, difference in changed.items())
        say(f"autotune: {_kernels(chosen)} as measured before, in {cache.path}{words}")
    if todo:
        count = sum(len(candidates(entry)) for entry in todo)
        say(
            f"autotune: measuring {_kernels(todo)} with {count} candidates in all on {cache.device}, for at most "
            f"{seconds:g} s; the choices go to {cache.path}"
        )
    deadline, run, prepared = time.monotonic() + seconds, None, None
    for done, (entry, call) in enumerate(todo.items()):
        if prepared != call:
            run = None  # the inputs of one call at a time
            run, prepared = calls[call](), call
        best = _best(entry, call, run, clock, deadline, say)
        if best is None:
            del CONTROL.chosen[entry]
            left = _kernels(list(todo)[done:])
            say(f"autotune: out of time; the table's parameters stay for {left}, which the next run measures")
            break
        CONTROL.chosen[entry] = chosen[entry] = best
        cache.put(call, entry, candidates(entry), best)
    return chosen


def _best(entry: Entry, call: str, run: Run, clock, deadline: float, say) -> dict | None:
    """The parameters to use; None where time runs out. Those in effect when this returns are the last that it tried."""
    table, *others = candidates(entry)

    def measure(parameters: dict) -> float:
        CONTROL.chosen[entry] = parameters
        return clock(run)

    def drop(parameters: dict, why: object) -> None:
        say(f"autotune: {_title(entry)} with {_difference(entry, parameters)}: dropped, {why}")

    before = measure(table)  # if the table's own fails there is nothing to choose: the error ends the run
    expected = run()
    times = []
    for parameters in others:
        if time.monotonic() > deadline:
            return None
        try:
            times.append((measure(parameters), parameters))
        except (TritonError, RuntimeError) as error:  # too large for the GPU, or more than the compiler takes
            drop(parameters, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    outcome = f"{before:.3f} ms, kept"
    for now, parameters in sorted(times, key=lambda pair: pair[0]):
        if now >= (1 - NOISE) * before:
            break
        CONTROL.chosen[entry] = parameters
        if wrong := disagreements(run(), expected, least=REORDERED):
            drop(parameters, f"WRONG RESULTS: {'; '.join(wrong)}")
        elif measure(parameters) < (1 - NOISE) * measure(table):  # again: the best of several is best by luck, too
            outcome = f"{before:.3f} -> {now:.3f} ms with {_difference(entry, parameters)}"
            table = parameters
            break
    say(f"autotune: {_title(entry)} in {call}: {1 + len(others)} candidates, {outcome}")
    return table


def _kernels(entries: Collection[Entry]) -> str:
    return f"{len(entries)} kernel{'s' * (len(entries) != 1)}"


def _title(entry: Entry) -> str:
    return entry.row if entry.size is None else f"{entry.row} (size to {entry.size})"


def _difference(entry: Entry, parameters: dict) -> str:
    table = candidates(entry)[0]
    return ", ".join(f"{name} {table[name]} -> {value}" for name, value in parameters.items() if value != table[name])
