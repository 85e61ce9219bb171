"""Measure whole training steps: tokens per second, peak memory, MFU; plain against fused, in turns within one run.

    python bench/train.py --preset gpt2 --tokenizer gpt2 --batch_size 8                  # a GPU, or this CPU
    torchrun --standalone --nproc_per_node=4 bench/train.py --preset gpt2 --tp 2 --dp 2 --tokenizer gpt2
    python bench/train.py --threads 2 --tokenizer gpt2 --batch_size 8 --block_size 256 \\
        --n_layer 6 --n_head 6 --n_embed 384                                             # a laptop's model
    python bench/train.py --threads 2 --tokenizer gpt2 --batch_size 2 --preset gpt2 --block_size 512

Model, batch, mesh and optimizer are set by train.py's own flags. --variants says what is compared: words joined by "+",
of plain, fused (which kernels), bf16, fp16 (activations; float32 without) and compile. The first is the 1.00 of the
ratios. Every variant starts from the same parameters and sees the same tokens; one whose first loss is off gets no
number.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # this folder's file names are not names for `import`
if importlib.util.find_spec("heiretsu") is None:
    sys.exit("heiretsu is not installed: run `pip install -e '.[bench]'` in the repository, or `make bench`")

import torch
import torch.distributed as dist

from heiretsu.bench import environment, tables
from heiretsu.bench.result_tables import engineering, milliseconds
from heiretsu.bench.timing import CLOCKS, Timing, measure_roofline, peak_extra_bytes
from heiretsu.data.terminal import escape_what_cannot_be_printed
from heiretsu.kernels import fused, plain
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh, make_mesh, process_groups
from heiretsu.parallel.pipeline import Microbatch
from heiretsu.run.batches import microbatches
from heiretsu.run.building import build_engine
from heiretsu.run.config import RunConfig
from heiretsu.run.cpu_memory import keep_freed_memory
from heiretsu.run.data_sheets import data_sheet
from heiretsu.run.device import find_device
from heiretsu.run.options import parse_args

CPU_VARIANTS = "plain,plain+bf16,plain+bf16+compile,fused+bf16"
GPU_VARIANTS = "plain+bf16,plain+bf16+compile,fused+bf16,fused+bf16+compile"
WORDS = {"plain", "fused", "bf16", "fp16", "compile"}
WARMUP_STEPS = 2  # compiles, allocates, and gives AdamW its state
LOSS_TOLERANCE = {"none": 1e-3, "bf16": 2e-2, "fp16": 5e-3}  # of the first loss, about ln(V), relative
HEADERS = ["variant", "first loss", "ms/step", "tokens/s", "x first", "MFU %", "peak MiB", "note"]


@dataclass
class Variant:
    """One way to run the same step. timing is None where it gets no number, for the reason in problem."""

    name: str
    config: RunConfig
    first_loss: float = float("nan")
    timing: Timing | None = None
    peak_bytes: int | None = None
    problem: str = ""


def variant(name: str, base: RunConfig) -> Variant:
    """The run that `name` stands for. ValueError for a word that is not known."""
    words = name.split("+")
    if unknown := sorted(set(words) - WORDS):
        raise ValueError(f"--variants {name}: {unknown[0]} is none of {', '.join(sorted(WORDS))}")
    amp: Any = next((word for word in words if word in ("bf16", "fp16")), "none")
    config = replace(base, fused="fused" in words, compile="compile" in words, amp=amp)
    return Variant(name, config)


class Run:
    """A built engine and its data: random tokens, the same for every variant and topology."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.engine: Engine = build_engine(config, mesh, fused if config.fused else plain)
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.global_batch_size, config.model.block_size + 1)
        self.tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
        self.step_idx = 0

    def step(self) -> float:
        """One optimizer step; returns its loss, which every rank has waited for."""
        batches = self.batches()
        self.step_idx += 1
        return self.engine.step(batches).metrics["loss"]

    def batches(self) -> list[Microbatch]:
        """Of the next step."""
        return microbatches(self.config, self.mesh, self._read, self.step_idx)

    def _read(self, samples: range) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokens[samples.start : samples.stop]
        return tokens[:, :-1], tokens[:, 1:]

    def timed_step(self, clock: Callable[[], float]) -> float:
        """Seconds by `clock`, from when all ranks are ready until this one is done."""
        if dist.is_initialized():
            dist.barrier()
        self._wait()
        started = clock()
        self.step()
        self._wait()
        return clock() - started

    def _wait(self) -> None:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)


def measure(variants: list[Variant], mesh: Mesh, rounds: int, sequential: bool, clock: Callable[[], float]) -> None:
    """Fill in the variants. sequential: one model in memory at a time; else a step of each in every round."""
    groups = [[one] for one in variants] if sequential else [variants]
    expected = float("nan")
    for group in groups:
        runs: dict[str, Run] = {}
        for one in group:
            run = prepare(one, mesh)
            expected = one.first_loss if one is variants[0] else expected
            error = abs(one.first_loss - expected) / abs(expected)
            if not error <= LOSS_TOLERANCE[one.config.amp]:
                one.problem = f"first loss {one.first_loss:.4f}, expected {expected:.4f}"
                continue
            runs[one.name] = run
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for done in range(rounds):
            names = list(runs)
            for name in names[done % len(names) :] + names[: done % len(names)]:
                samples[name].append(runs[name].timed_step(clock))
        for one in group:
            if one.name in samples:
                one.timing = Timing.of(samples[one.name])


def prepare(one: Variant, mesh: Mesh) -> Run:
    """Build, warm up, and measure the memory of one step."""
    run = Run(one.config, mesh)
    one.first_loss = run.step()
    for _ in range(WARMUP_STEPS - 1):
        run.step()
    one.peak_bytes = peak_extra_bytes(run.step, mesh.device)
    return run


def peak_flops(device: torch.device, amp: str, ranks: int, clock: Callable[[], float]) -> tuple[float, str]:
    """(FLOP/s of the whole machine, where the figure is from). Ranks on a CPU share it; each has a GPU of its own."""
    if device.type == "cuda":
        if sheet := data_sheet(torch.cuda.get_device_name(device)):
            return sheet.bf16_flops * ranks, f"data sheet of the {sheet.name}, dense bf16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp, torch.float32)
    rate = measure_roofline(device, dtype, clock).flops_per_s
    if device.type == "cuda":
        return rate * ranks, "matrix products measured here"
    return rate, "matrix products measured here"


def rows(variants: list[Variant], peaks: dict[str, tuple[float, str]]) -> list[list[str]]:
    table = []
    for one in variants:
        row = [one.name, f"{one.first_loss:.4f}"]
        if one.timing is None:
            table.append(row + ["-"] * 5 + [f"no number: {one.problem}"])
            continue
        rate = one.config.tokens_per_step / one.timing.median
        first = variants[0].timing
        row += [milliseconds(one.timing), f"{rate:,.0f}", f"{one.timing.speedup_over(first):.2f}" if first else "-"]
        row += [f"{100 * rate * one.config.model.flops_per_token / peaks[one.config.amp][0]:.0f}"]
        table.append(row + ["-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.0f}", ""])
    return table


def describe(config: RunConfig) -> str:
    model = config.model
    experts = f", {model.num_experts} experts top {model.top_k}" if model.num_experts else ""
    sizes = f"{model.n_layer} layers, {model.n_head} heads, {model.n_embed} wide, block {model.block_size}"
    return (
        f"model   {model.num_parameters:,} parameters: {sizes}, vocabulary {model.vocab_size}{experts}\n"
        f"mesh    dp {config.dp} x ep {config.ep} x pp {config.pp} x tp {config.tp}\n"
        f"batch   {config.global_batch_size} sequences, {config.tokens_per_step:,} tokens a step"
    )


def main() -> int:
    escape_what_cannot_be_printed()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="and every flag of train.py")
    parser.add_argument("--variants", help=f"default on a CPU {CPU_VARIANTS}, on a GPU {GPU_VARIANTS}")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each variant (%(default)s)")
    parser.add_argument("--sequential", action="store_true", help="one model in memory at a time: for large ones")
    parser.add_argument("--threads", type=int, help="CPU threads of each rank (default: PyTorch's own choice)")
    parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS), help="cpu: CPU time, on a busy machine")
    parser.add_argument(
        "--malloc",
        default="keep",
        choices=("keep", "default"),
        help="on a CPU: keep what a step frees, as train.py does",
    )
    parser.add_argument("--json", metavar="FILE", help="also write every figure there")
    args, training_flags = parser.parse_known_args()
    base = parse_args(training_flags)
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu also counts threads that wait for each other: use it with --threads 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = find_device(replace(base, fused="fused" in (args.variants or CPU_VARIANTS)))
        names = (args.variants or (GPU_VARIANTS if device.type == "cuda" else CPU_VARIANTS)).split(",")
        variants = [variant(name, base) for name in names]
        backend = base.backend_on(device.type)
    except ValueError as error:
        parser.error(str(error))
    with process_groups(backend, base.num_ranks):
        return compare(base, variants, device, args)


def compare(base: RunConfig, variants: list[Variant], device: torch.device, args: argparse.Namespace) -> int:
    """Measure the variants on this rank's mesh, print the table, and say by the exit status whether all were right."""
    mesh = make_mesh(base.dp, base.ep, base.pp, base.tp, device)
    ranks = mesh.world.size
    facts = environment.describe(device)
    if device.type == "cpu":
        allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        kept = args.malloc == "keep" and keep_freed_memory()
        facts["malloc"] = str(allocator) if allocator else "keeps what is freed" if kept else "as the system has it"
    if args.clock == "cpu":
        facts["clock"] = "CPU seconds of rank 0, because others used the machine, too"
    peaks: dict[str, tuple[float, str]] = {
        one.config.amp: peak_flops(device, one.config.amp, ranks, CLOCKS[args.clock]) for one in variants
    }
    if mesh.rank == 0:
        print(environment.as_text(facts))
        print(describe(base))
        for amp, (peak, source) in peaks.items():
            print(f"peak    {engineering(peak)}FLOP/s for {base.dtype if amp == 'none' else amp}: {source}")
        print(f"fused   {fused.describe(device)}", flush=True)
    measure(variants, mesh, args.rounds, args.sequential, CLOCKS[args.clock])
    if mesh.rank == 0:
        print(f"\n{tables.aligned(HEADERS, rows(variants, peaks))}\n")
        print(
            "ms/step: median of alternating steps, ± half the distance of the quartiles. peak: of rank 0, over what it"
        )
        print(
            "held before the step. MFU: useful FLOPs, 6 a parameter and token and causal attention, against the peak."
        )
        if args.json:
            Path(args.json).write_text(json.dumps(as_json(variants, peaks, facts), indent=1) + "\n")
    return 1 if any(one.problem for one in variants) else 0


def as_json(variants: list[Variant], peaks, facts) -> dict:
    found = []
    for one in variants:
        row: dict[str, object] = {"variant": one.name, "first_loss": one.first_loss, "problem": one.problem}
        if one.timing:
            rate = one.config.tokens_per_step / one.timing.median
            row |= {
                "median_ms": one.timing.median * 1e3,
                "low_ms": one.timing.low * 1e3,
                "high_ms": one.timing.high * 1e3,
                "tokens_per_s": rate,
                "times_first": one.timing.speedup_over(variants[0].timing) if variants[0].timing else None,
                "mfu": rate * one.config.model.flops_per_token / peaks[one.config.amp][0],
                "peak_bytes": one.peak_bytes,
            }
        found.append(row)
    return {"machine": facts, "config": json.loads(variants[0].config.to_json()), "variants": found}


if __name__ == "__main__":
    sys.exit(main())
