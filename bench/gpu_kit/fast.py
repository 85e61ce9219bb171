"""How fast is it? Each op beside the best alternatives that are installed, in turns, on shapes of real models.

warm: compiles what the alternatives need compiled, by several processes at once, so that the timing does not wait for
it. time: one process, alone on the device. Parity comes first here too: what is wrong gets no number, and of ours that
is a failure.
"""

from __future__ import annotations

import functools

import torch

from heiretsu.bench import measure, rivals, workloads
from heiretsu.bench.gpu_kit.kit import Item, Kit
from heiretsu.bench.timing import Roofline, measure_roofline
from heiretsu.bench.workloads import Workload

DTYPE = torch.bfloat16
COMPILES = {"compiled plain", "flex_attention", "compiled chunks"}
MAX_COMPILED_LENGTH = 4096  # plain attention beyond would not fit, compiled or not


def items(kit: Kit, group: str) -> list[Item]:
    task = {"warm": warm, "time": time_one}[group]
    work = chosen(kit.rehearse)
    if kit.rehearse and group == "warm":
        work = work[-1:]
    return [Item(f"{group} {w.op} {w.name}", functools.partial(task, kit, w)) for w in work]


def chosen(rehearse: bool) -> list[Workload]:
    """By worth: the shapes that the targets name, then those of other models, then other lengths and widths."""
    attention, mixture = workloads.attention, workloads.expert_mlp
    if rehearse:
        return [
            attention("H=4:1 D=16", 1, 4, 32, 16, Hkv=1),
            workloads.layer_norm("tiny", 8, 32),
            workloads.route("tiny", 16, 4, 2),
            mixture("tiny", 16, 16, 32, 4, "balanced"),
            workloads.linear_cross_entropy("tiny", 8, 16, V=50),
        ]

    def heads(H, D, T, Hkv=None):
        series = f"H={H}{f':{Hkv}' if Hkv else ''} D={D}"
        return attention(series, max(1, 16384 // T), H, T, D, Hkv=Hkv)

    def qwen(N, balance):  # Qwen3-30B-A3B: 128 experts 768 wide, of which 8 serve a token
        return mixture("C=2048 F=768", N, 2048, 768, 128, balance, top_k=8)

    named = [
        heads(16, 64, 4096),
        heads(16, 128, 4096),
        mixture("C=768 F=3072", 8192, 768, 3072, 8, "balanced"),
        workloads.linear_cross_entropy("C=768", 8192, 768),
        workloads.layer_norm("16k tokens", 16384, 768),
        workloads.bias_gelu("16k tokens", 16384, 3072),
    ]
    others = [
        heads(32, 128, 4096, Hkv=8),
        qwen(4096, "balanced"),
        heads(12, 64, 1024),
        qwen(4096, "skewed"),
        mixture("C=768 F=3072", 8192, 768, 3072, 8, "skewed"),
        workloads.dropout("16k tokens", 16, 1024, 768),
        workloads.route("E=128 K=8", 16384, 128, 8),
        attention("H=12 D=64 dropout", 16, 12, 1024, 64, 0.1),
    ]
    lengths = [heads(H, D, T, Hkv) for T in (16384, 1024, 8192, 2048) for H, D, Hkv in ((16, 64, None), (32, 128, 8))]
    widths = [
        workloads.layer_norm("16k tokens", 16384, 2048),
        workloads.bias_gelu("16k tokens", 16384, 6400),
        mixture("C=1600 F=6400", 8192, 1600, 6400, 8, "balanced"),
        workloads.linear_cross_entropy("C=2048", 8192, 2048),
        qwen(16384, "balanced"),
        mixture("C=768 F=3072", 8192, 768, 3072, 64, "one-hot"),
    ]
    return named + others + lengths + widths


def with_compiled_plain(workload: Workload) -> bool:
    return workload.op != "attention" or workload.size <= MAX_COMPILED_LENGTH


def warm(kit: Kit, workload: Workload) -> None:
    """Forward and backward of what is compiled, once; the compilers' caches on disk keep it. Nothing is judged here."""
    inputs = measure.place(workload.inputs(torch.Generator().manual_seed(0), DTYPE), kit.torch_device)
    found = measure.implementations(workload, kit.torch_device, with_compiled_plain(workload))
    for name, call in (found | rivals.on_gpu(workload)).items():
        if name not in COMPILES and name != measure.OURS:
            continue
        try:
            outputs = call(inputs)
            torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
        except Exception as error:  # the timing will meet it again, and say so in the row
            print(f"warm {workload.op} {workload.name} {name}: {type(error).__name__}: {str(error)[:200]}")
        kit.device.release_memory()


def time_one(kit: Kit, workload: Workload) -> None:
    roof = kit.roofline() or roofline_here(kit)
    results = measure.measure(
        workload, kit.torch_device, DTYPE, roof, quick=True, compiled=with_compiled_plain(workload),
        clock=kit.device.clock(), tiny=kit.rehearse,
    )  # fmt: skip
    for result in results:
        write(kit, result)
    ours = next(result for result in results if result.implementation == measure.OURS)
    if ours.problem:
        out_of_memory = "out of memory" in ours.problem.lower()
        kit.failure("out of memory" if out_of_memory else "wrong", ours.problem)


@functools.cache
def roofline_here(kit: Kit) -> Roofline:
    return measure_roofline(kit.torch_device, DTYPE, kit.device.clock(), tiny=kit.rehearse)


def write(kit: Kit, result: measure.Result) -> None:
    """One implementation on one workload, with all that the report's tables and charts are made of."""
    workload = result.workload
    passes: dict[str, dict] = {}
    for name, timing in result.timings.items():
        value, unit = result.rate(name)
        passes[name] = {
            "median_s": timing.median, "low_s": timing.low, "high_s": timing.high, "rate": value, "rate_unit": unit,
            "times_plain": result.speedups.get(name), "share_of_roof": result.shares[name],
        }  # fmt: skip
    kit.figure(
        f"{workload.op} {workload.name}",
        passes.get(measure.BOTH, {}).get("median_s"),
        "s",
        implementation=result.implementation,
        op=workload.op,
        series=workload.series,
        size_name=workload.size_name,
        size=workload.size,
        flops=workload.flops,
        elements=workload.elements,
        passes=passes,
        peak_bytes=result.peak_bytes,
        problem=result.problem,
    )
