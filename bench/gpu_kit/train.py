"""Does it train, and how fast? Whole steps of GPT-2 124M, and train.py as a user runs it.

In order of worth: steps in turns (plain, compiled, fused, both); 200 steps stopped in the middle and resumed; a
profile; the curve of a CPU; the same model with experts; what --autotune chooses and gains.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from heiretsu.bench import train as steps_of
from heiretsu.bench.gpu_kit import rehearsal, trace
from heiretsu.bench.gpu_kit.kit import LONG_S, ROOT, Item, Kit
from heiretsu.bench.gpu_kit.proof import triton_ops
from heiretsu.bench.timing import Timing
from heiretsu.data.corpus import load_corpus
from heiretsu.data.folder import shard_name
from heiretsu.data.shards import write_shard
from heiretsu.kernels import fused
from heiretsu.kernels.control import CONTROL
from heiretsu.kernels.gpu import autotune
from heiretsu.kernels.recording import recording
from heiretsu.parallel.mesh import make_mesh
from heiretsu.run.config import RunConfig
from heiretsu.run.data_sheets import data_sheet
from heiretsu.run.options import parse_args
from heiretsu.run.tuning import call_runs, record_calls

GPT2 = "--preset gpt2 --tokenizer gpt2 --block_size 1024".split()
TINY = "--n_layer 2 --n_head 2 --n_embed 32 --block_size 32".split()
EXPERTS = "--num_experts 8 --top_k 2 --moe_freq 2".split()
VARIANTS = ("plain+bf16", "plain+bf16+compile", "fused+bf16", "fused+bf16+compile")
BATCHES = (64, 48, 32, 24, 16, 8, 4)  # the largest that plain fits is everybody's
ROUNDS = 10
CURVE_STEPS = 200
CURVE_TOLERANCE = 2e-2  # relative, of a bf16 loss: not every kernel of PyTorch's own sums in one order
CPU_STEPS, CPU_TOLERANCE = 30, 2e-3


def items(kit: Kit, group: str) -> list[Item]:
    def item(name, task, *arguments):
        return Item(name, functools.partial(task, kit, *arguments), LONG_S)

    return [
        item("steps of GPT-2", time_steps, "GPT-2", []),
        item("stopped and resumed", resume_curve),
        item("profile", profile_step),
        item("CPU against device", cpu_curve),
        item("steps of GPT-2 with 8 experts", time_steps, "GPT-2, 8 experts", EXPERTS),
        item("autotune", tune),
    ]


def config(kit: Kit, flags: list[str], batch_size: int) -> RunConfig:
    return parse_args([*(TINY if kit.rehearse else GPT2), *flags, "--batch_size", str(batch_size)], world_size=1)


# ---- steps


def time_steps(kit: Kit, name: str, flags: list[str]) -> None:
    """The variants in turns, each figure as soon as it is known; one that fails or is wrong leaves the others."""
    mesh = make_mesh(1, 1, 1, 1, kit.torch_device)
    batch_size, runs = largest_batch(kit, flags, mesh)
    expected: float | None = None
    samples: dict[str, tuple] = {}
    for variant_name in VARIANTS[:: 2 if kit.rehearse and flags else 1]:
        variant = steps_of.variant(variant_name, config(kit, flags, batch_size))
        try:
            run = runs.pop(variant_name, None) or steps_of.prepare(variant, mesh)
        except Exception as error:
            kit.failure(
                "error", f"{variant_name}: {type(error).__name__}: {str(error)[:500]}", f"{name}: {variant_name}"
            )
            kit.device.release_memory()
            continue
        if isinstance(run, tuple):
            run, variant = run
        expected = variant.first_loss if expected is None else expected
        if not abs(variant.first_loss - expected) <= steps_of.LOSS_TOLERANCE["bf16"] * abs(expected):
            kit.failure(
                "wrong", f"first loss {variant.first_loss:.4f}, plain {expected:.4f}", f"{name}: {variant_name}"
            )
            continue
        samples[variant_name] = (run, variant, [])
        kit.figure(f"{name}: {variant_name}, first loss", variant.first_loss, "nats", peak_bytes=variant.peak_bytes)
    for done in range(3 if kit.rehearse else ROUNDS):
        names = list(samples)
        for variant_name in names[done % len(names) :] + names[: done % len(names)]:
            run, _, times = samples[variant_name]
            times.append(run.timed_step(kit.clock_s))
    for variant_name, (_, variant, times) in samples.items():
        write_rate(kit, f"{name}: {variant_name}", variant.config, Timing.of(times), variant.peak_bytes)


def largest_batch(kit: Kit, flags: list[str], mesh) -> tuple[int, dict]:
    """(sequences that plain fits with room for the others' parameters, {plain's name: (its run, its variant)})."""
    for batch_size in (2,) if kit.rehearse else BATCHES:
        variant = steps_of.variant(VARIANTS[0], config(kit, flags, batch_size))
        try:
            run = steps_of.prepare(variant, mesh)
        except torch.OutOfMemoryError:
            kit.device.release_memory()
            continue
        kit.device.release_memory()
        left = kit.device.free_bytes()
        if kit.rehearse or left > 0.25 * kit.device.properties.total_memory:
            return batch_size, {VARIANTS[0]: (run, variant)}
        del run  # it fits alone; three more models and their activations would not
    raise torch.OutOfMemoryError(f"not even {BATCHES[-1]} sequences fit")


def write_rate(kit: Kit, name: str, config: RunConfig, timing: Timing, peak_bytes: int | None) -> None:
    rate = config.tokens_per_step / timing.median
    sheet, source = data_sheet(kit.device.name), "data sheet"
    peak = sheet.bf16_flops if sheet else None
    if peak is None:
        roof = kit.roofline()
        peak, source = (roof.flops_per_s, "matrix products here") if roof else (None, "no peak is known")
    kit.figure(
        name, rate, "tokens/s", ms=1e3 * timing.median, ms_low=1e3 * timing.low, ms_high=1e3 * timing.high,
        mfu=rate * config.model.flops_per_token / peak if peak else None, mfu_of=source,
        peak_mib=peak_bytes / 2**20 if peak_bytes is not None else None, batch_size=config.batch_size,
    )  # fmt: skip


# ---- train.py itself


def data_folder(kit: Kit) -> Path:
    """Token shards over GPT-2's vocabulary that a model can learn, without a tokenizer: pairs of bytes of real text."""
    folder = kit.scratch / "pairs"
    if not folder.exists():
        folder.mkdir()
        for split, part in zip(("train", "val"), load_corpus(), strict=True):
            single = part.tokens[: 20_000 if kit.rehearse else None].astype(np.int64)
            write_shard(folder / shard_name(split, 0), ((single[:-1] * 257 + single[1:]) % 50257).astype(np.uint16))
    return folder


def train(kit: Kit, log: str, *flags: str, device: str | None = None, **environment: str) -> list[dict]:
    """Run train.py with the flags of the size at hand; its log, a dict a step. Raises RuntimeError if it fails."""
    path = kit.scratch / f"{log}.jsonl"
    size = TINY if kit.rehearse else ["--preset", "gpt2", "--block_size", "1024"]
    command = [kit.python, str(ROOT / "train.py"), *size, "--device", device or kit.torch_device.type]
    command += ["--log_file", str(path), "--sample_tokens", "0", "--eval_interval", "0", *flags]
    run_program(kit, command, **environment)
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_program(kit: Kit, command: list[str], **environment: str) -> str:
    """Its output. Raises RuntimeError, with the last lines, if it fails or takes longer than the part has."""
    limit = max(30.0, kit.seconds_left())
    variables = kit.environment(**environment)
    forked = kit.rehearse and command[1].endswith("train.py")  # alone; torchrun starts its own
    start = functools.partial(rehearsal.run_script, kit.scratch) if forked else subprocess.run
    try:
        done = start(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(
            f"{Path(command[1]).name} was ended after {limit:.0f} s, when the part's time was over"
        ) from late
    output = done.stdout + done.stderr
    print(" ".join(command), output[-20_000:], sep="\n")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} ... ended with status {done.returncode}: {output.strip()[-700:]}")
    return output


def resume_curve(kit: Kit) -> None:
    """A run straight through, saved in the middle; and one that goes on from there. The second halves must be one."""
    steps = 4 if kit.rehearse else CURVE_STEPS
    half, saved = steps // 2, kit.scratch / "checkpoints"
    common = ["--fused", "--amp", "bf16", "--data_dir", str(data_folder(kit)), "--max_iters", str(steps)]
    common += [
        "--batch_size",
        "2" if kit.rehearse else "8",
        "--learning_rate",
        "6e-4",
        "--warmup_iters",
        str(half // 2),
    ]
    straight = train(
        kit, "straight", *common, "--checkpoint_dir", str(saved), "--save_interval", str(half), "--keep", "2"
    )
    first = min(path for path in saved.iterdir() if path.is_dir())  # the checkpoint of the middle
    resumed = train(kit, "resumed", *common, "--resume", str(first))
    rates = sorted(line["tokens_per_s"] for line in straight[half:])
    kit.figure("train.py --fused --amp bf16", rates[len(rates) // 2], "tokens/s", last_loss=straight[-1]["loss"])
    same_curve(kit, straight[half:], resumed, CURVE_TOLERANCE, "resumed in the middle")
    falls = straight[-1]["loss"] < straight[0]["loss"]
    kit.check(falls or kit.rehearse, f"from {straight[0]['loss']:.4f} to {straight[-1]['loss']:.4f}", "the loss falls")


def cpu_curve(kit: Kit) -> None:
    """A small model in float32, on the CPU and on the device: the same losses."""
    steps = 3 if kit.rehearse else CPU_STEPS
    flags = ["--preset", "tiny", "--fused", "--max_iters", str(steps), "--batch_size", "2" if kit.rehearse else "8"]
    if not kit.rehearse:
        flags += "--n_layer 4 --n_head 4 --n_embed 128 --block_size 128".split()
    flags += ["--data_dir", str(data_folder(kit))]
    cpu, here = train(kit, "cpu", *flags, device="cpu"), train(kit, "device", *flags)
    same_curve(kit, cpu, here, CPU_TOLERANCE, "CPU against device, float32")


def same_curve(kit: Kit, ours: list[dict], theirs: list[dict], tolerance: float, name: str) -> None:
    pairs = [(a["loss"], b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    kit.figure(name, worst, "largest relative difference of a loss", steps=len(pairs), exact=worst == 0.0)
    kit.check(worst <= tolerance, f"losses differ by {worst:.2g}, {tolerance:.0e} allowed", name)


# ---- profile


def profile_step(kit: Kit) -> None:
    """Where a fused step's time goes, and how often the host waits in it."""
    mesh = make_mesh(1, 1, 1, 1, kit.torch_device)
    run = steps_of.Run(replace(config(kit, [], 2 if kit.rehearse else 16), fused=True, amp="bf16"), mesh)
    with recording() as record:
        run.step()
    for _ in range(0 if kit.rehearse else 2):
        run.step()
    on_gpu = not kit.rehearse
    events = trace.record(run.step, kit.out / "trace.json.gz", on_gpu)
    spans = trace.kernels(events, on_gpu)
    ours = {launch.kernel.__name__ for launch in record.launches}
    seconds = trace.shares(spans, ours)
    busy = sum(seconds.values())
    for whose, amount in seconds.items():
        kit.figure(
            f"a fused step in {whose}", amount / busy if busy else None, "share of the kernels' time", ms=1e3 * amount
        )
    length = spans[-1].end - spans[0].begin if spans else 0.0
    kit.figure(
        "idle between kernels", 1 - 1e6 * busy / length if length else None, "share of the step", ms=length / 1e3
    )
    largest: dict[str, float] = {}
    for span in spans:
        if span.name not in ours and not trace.MATRIX_LIBRARY.search(span.name):
            largest[span.name[:80]] = largest.get(span.name[:80], 0.0) + 1e3 * span.seconds
    for name, ms in sorted(largest.items(), key=lambda pair: -pair[1])[:5]:
        kit.figure(f"outside of ours and the matrix library: {name}", ms, "ms a step")
    waits = trace.host_waits(events, on_gpu)
    kit.figure("the host waits for the device", sum(waits.values()), "times a step", by=waits)
    kit.figure("synchronising calls that PyTorch warns of", count_synchronisations(kit, run.step), "times a step")


def count_synchronisations(kit: Kit, step) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kit.device.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            kit.device.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message).lower() for warning in caught)


# ---- autotune


def tune(kit: Kit) -> None:
    """What train.py --autotune chooses for this model, what it costs, and what a step gains."""
    mesh = make_mesh(1, 1, 1, 1, kit.torch_device)
    cache = kit.scratch / "autotune.json"
    run = steps_of.Run(replace(config(kit, [], 1 if kit.rehearse else 16), fused=True, amp="bf16"), mesh)
    calls = record_calls(run.engine, run.batches())
    if kit.rehearse:
        calls = [call for call in calls if call.op == "bias_gelu"]
        with rehearsal.compiling_driver(launches=False):
            runs = call_runs(calls, triton_ops(), kit.torch_device)
            said = choose(kit, runs, cache, lambda run: float(bool(run())))
        return report_choices(kit, said)
    before = [run.timed_step(kit.clock_s) for _ in range(2 + ROUNDS)][2:]
    said = choose(kit, call_runs(calls, fused, kit.torch_device), cache, autotune.milliseconds)
    after = [run.timed_step(kit.clock_s) for _ in range(2 + ROUNDS)][2:]
    report_choices(kit, said)
    gain = Timing.of(before).median / Timing.of(after).median
    kit.figure("autotune: a step", gain, "times as fast as with the table's parameters")


def choose(kit: Kit, calls, cache: Path, clock) -> list[str]:
    """autotune.tune, and what it said."""
    said: list[str] = []
    CONTROL.chosen.clear()
    autotune.tune(
        calls, kit.torch_device, cache, clock, said.append, seconds=max(5.0, min(60.0, kit.seconds_left() - 10))
    )
    return said


def report_choices(kit: Kit, said: list[str]) -> None:
    for line in said:
        print(line)
        if "WRONG RESULTS" in line:
            kit.failure("wrong", line, "autotune")
        elif match := re.match(r"autotune: (.+) in .*: (\d+) candidates, (.+)", line):
            kit.fact(f"autotune: {match[1]}", f"{match[3]} of {match[2]} candidates")
