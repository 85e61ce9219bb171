"""Was the proof true? What was said without a GPU, beside what the GPU says. Each disagreement is a finding.

resources: registers, spills and shared memory of every audited configuration, compiled by the Triton that is here and
loaded into the driver, beside the audit's reading of the same code and beside the published audit; and whether the
kernels that a model launches are those that the audit compiled. bits: the emulator's results beside the device's.
bounds: the share of the peak that each kernel reaches, beside the audit's upper bound for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from heiretsu.bench import train as steps_of
from heiretsu.bench import workloads
from heiretsu.bench.gpu_kit import published, rehearsal, trace
from heiretsu.bench.gpu_kit.device import compiled_variants, resources
from heiretsu.bench.gpu_kit.kit import Item, Kit
from heiretsu.bench.measure import place
from heiretsu.bench.parity import cotangents_for, gradients_of
from heiretsu.kernels import fused
from heiretsu.kernels.arguments import CHECKS
from heiretsu.kernels.recording import recording
from heiretsu.offgpu.audit import analysis
from heiretsu.offgpu.audit.calls import Configuration, configurations
from heiretsu.offgpu.audit.compiling import compile_kernel
from heiretsu.offgpu.emulator import installed
from heiretsu.offgpu.machines import machine
from heiretsu.parallel.mesh import make_mesh
from heiretsu.run.data_sheets import data_sheet
from heiretsu.run.options import parse_args
from heiretsu.run.tuning import call_runs, record_calls
from tests.kernels import forms
from tests.kernels.cases import all_cases
from tests.kernels.parity import Case, dtype_name, run

EMULATED = {"8": 80, "9": 90}  # by the first digit of the compute capability
REHEARSED_CASES = 2
GPT2 = "--preset gpt2 --tokenizer gpt2 --batch_size 8 --fused --amp bf16".split()
TINY = "--n_layer 1 --n_head 1 --n_embed 16 --block_size 16 --batch_size 1 --fused --amp bf16".split()
EXPERTS = "--num_experts 8 --moe_freq 2".split()


def items(kit: Kit, group: str) -> list[Item]:
    if kit.device.arch is None:
        name = kit.device.name
        return [
            Item(f"{group}: no audit", lambda: kit.absent(f"proof, {group}", f"the audit knows nothing of a {name}"))
        ]
    return {"resources": resource_items, "bits": bit_items, "bounds": bound_items}[group](kit)


# ---- resources


def resource_items(kit: Kit) -> list[Item]:
    cases = configurations(machine(kit.device.arch))
    if kit.rehearse:
        cases = [case for case in cases if case.name.startswith("bias_gelu")][:REHEARSED_CASES]
    found = [
        Item(f"launched by {name}", functools.partial(compare_launches, kit, flags))
        for name, flags in (("GPT-2", GPT2), ("GPT-2 with experts", GPT2 + EXPERTS))[: 1 if kit.rehearse else 2]
    ]
    return found + [Item(f"compiled {case.name}", functools.partial(compare_resources, kit, case)) for case in cases]


def compare_resources(kit: Kit, case: Configuration) -> None:
    target = machine(kit.device.arch)
    compiled = compile_kernel(target, *case.code)
    if kit.rehearse:
        with rehearsal.compiling_driver():
            driver = resources(compiled)
    else:
        driver = resources(compiled)
    read = analysis.analyze(target, *case.code)  # the same code, out of Triton's cache
    claim = published.claims(kit.device.arch).get(case.name)
    kit.figure(
        case.name, driver.registers, "registers", spill_bytes=driver.spill_bytes, shared_bytes=driver.shared_bytes,
        read=[read.registers, read.spill_bytes, read.shared_bytes], bound=read.bound,
        published=[claim.registers, claim.spill_bytes, int(claim.shared_kib * 1024)] if claim else None,
    )  # fmt: skip
    if (driver.registers, driver.spill_bytes, driver.shared_bytes) != (
        read.registers, read.spill_bytes, read.shared_bytes,
    ):  # fmt: skip
        kit.finding(
            f"{case.name}: the driver says {driver}; the audit reads {read.registers} registers, {read.spill_bytes} "
            f"spilled bytes and {read.shared_bytes / 1024:.1f} KiB off the same code"
        )
    if claim and driver.spill_bytes > claim.spill_bytes:
        kit.finding(f"{case.name}: spills {driver.spill_bytes} bytes here, {claim.spill_bytes} in the published audit")
    elif claim and abs(driver.registers - claim.registers) > 8:
        kit.finding(f"{case.name}: {driver.registers} registers here, {claim.registers} in the published audit")


def compare_launches(kit: Kit, flags: list[str]) -> None:
    """Launch what a model of these flags launches, and look up each compiled kernel among the audit's cases."""
    with recording() as record:
        if kit.rehearse:
            with rehearsal.compiling_driver():
                call_kernels(kit, TINY, limit=("bias_gelu",))
        else:
            call_kernels(kit, flags)
    cases = configurations(machine(kit.device.arch))
    for fn in dict.fromkeys(launch.kernel for launch in record.launches):
        for constants, compiled in compiled_variants(fn):
            case = matching_case(cases, fn, constants, compiled)
            said = resources(compiled) if not kit.rehearse else None
            name = f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}"
            blocks = {k: v for k, v in constants.items() if k.startswith("BLOCK") or k in ("ROWS", "D", "EPILOGUE")}
            kit.figure(
                f"{name} {blocks}", compiled.metadata.num_warps, "warps", case=case.name if case else None,
                registers=said and said.registers, spill_bytes=said and said.spill_bytes,
            )  # fmt: skip
            if case is None:
                kit.finding(
                    f"{name} {blocks} is launched, and no case of the audit has these parameters and types", name
                )


def call_kernels(kit: Kit, flags: list[str], limit: tuple[str, ...] = ()) -> None:
    """Forward and backward of each op of a model as its training calls it. limit: to the ops of these names."""
    mesh = make_mesh(1, 1, 1, 1, kit.torch_device)
    model = steps_of.Run(replace(parse_args(flags, world_size=1), fused=True), mesh)
    calls = [call for call in record_calls(model.engine, model.batches()) if not limit or call.op in limit]
    for prepare in call_runs(calls, triton_ops(), kit.torch_device).values():
        prepare()()


def triton_ops():
    """The ops as their kernel files define them: they launch Triton whatever the tensor's device."""

    class Ops:
        pass

    for op in CHECKS:
        setattr(Ops, op, staticmethod(forms.triton_form(op)))
    return Ops


def matching_case(cases: list[Configuration], fn, constants: dict, compiled) -> Configuration | None:
    """The audit's case that was compiled with the same flags, block sizes, warps, stages and pointer types."""
    types = dict(compiled.src.signature)

    def fits(case: Configuration) -> bool:
        flags = {name: value for name, value in case.constexprs.items() if name.isupper()}
        pointers = {name: kind.partition(":")[0] for name, kind in case.signature.items() if kind.startswith("*")}
        return (
            case.fn is fn
            and all(constants.get(name) == value for name, value in flags.items())
            and all(types.get(name) in (kind, "constexpr", None) for name, kind in pointers.items())
            and (case.num_warps, case.num_stages) == (compiled.metadata.num_warps, compiled.metadata.num_stages)
        )

    return next((case for case in cases if fits(case)), None)


# ---- bits


def bit_items(kit: Kit) -> list[Item]:
    target = EMULATED.get(str(kit.device.cuda.get_device_capability(0)[0])) if not torch.version.hip else None
    if target is None:
        why = f"the emulator executes code for compute capability 8 and 9, not for a {kit.device.name}"
        return [Item("emulator", lambda: kit.absent("the emulator's results beside the device's", why))]
    rows = [(case, dtype) for case in all_cases() if case.emulate for dtype in case.dtypes]
    if kit.rehearse:
        rows = [row for row in rows if row[0].op == "bias_gelu"][:1]
    return [
        Item(
            f"bits {case.op}/{case.name}/{dtype_name(dtype)}", functools.partial(compare_bits, kit, case, dtype, target)
        )
        for case, dtype in rows
    ]


def compare_bits(kit: Kit, case: Case, dtype: torch.dtype, target: int) -> None:
    kernel = forms.triton_form(case.op)
    with installed(target=target, schedule="lockstep") as emulated:
        expected = run(case, dtype, kernel)
    if emulated.findings:
        kit.finding(f"the emulator itself complains: {emulated.findings[0]}")
    if kit.rehearse:
        with rehearsal.compiling_driver(launches=True):
            found = run(case, dtype, kernel)
    else:
        found = run(case, dtype, kernel, kit.torch_device)
    differences = {name: text for name, x in expected.items() if (text := difference(found[name], x))}
    kit.figure(kit.item, len(differences), "tensors that differ", of=len(expected), differences=differences)
    if differences:
        kit.finding("; ".join(f"{name}: {text}" for name, text in differences.items()))


def difference(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> str:
    """'' where the bits are equal; else how many elements differ, and by how many ulps of the largest element."""
    if ours is None or theirs is None:
        return "" if ours is theirs else "one of them has none"
    ours, theirs = ours.detach().cpu(), theirs.detach().cpu()
    different = ours.double().nan_to_num(nan=1e300) != theirs.double().nan_to_num(nan=1e300)
    if not different.any():
        return ""
    count = f"{int(different.sum())} of {theirs.numel()} elements"
    if not theirs.is_floating_point():
        return count
    scale = theirs.abs().max().item() or 1.0
    worst = (ours.double() - theirs.double()).abs().max().item()
    return f"{count}, by at most {worst / scale / torch.finfo(theirs.dtype).eps:.2g} ulps of the largest"


# ---- bounds


def bound_items(kit: Kit) -> list[Item]:
    return [
        Item(f"bounds {name}", functools.partial(compare_bounds, kit, *of_op)) for name, of_op in bounds(kit).items()
    ]


def bounds(kit: Kit) -> dict[str, tuple]:
    """{op and shape: (workload, [(kernel's name, audit case, FLOPs of all its launches, every how manieth, from)])}.

    A kernel that is launched for several purposes is told apart by the order of its launches.
    """
    found: dict[str, tuple] = {}
    if not kit.rehearse:
        for D, H in ((64, 16), (128, 16)):
            workload = workloads.attention(f"H={H} D={D}", 4, H, 4096, D)
            products = workload.flops[0] / 2  # of one matrix product over the visible half
            found[f"attention D={D} T=4096"] = (
                workload,
                [
                    ("_forward_kernel", f"attention_forward D{D}", 2 * products, 1, 0),
                    ("_dkdv_kernel", f"attention_dkdv D{D}", 4 * products, 1, 0),
                    ("_dq_kernel", f"attention_dq D{D}", 3 * products, 1, 0),
                ],
            )
        workload = workloads.expert_mlp("C=768 F=3072", 8192, 768, 3072, 8, "balanced")
        one = workload.flops[0] / 2
        found["expert_mlp E=8"] = (
            workload,
            [
                ("_grouped_gemm_kernel", "expert_mlp hidden (x W1, bias, GELU)", one, 4, 0),
                ("_grouped_gemm_kernel", "expert_mlp output (a W2, bias)", one, 4, 1),
                ("_grouped_gemm_kernel", "expert_mlp dhidden (dout W2^T, GELU backward)", one, 4, 2),
                ("_grouped_gemm_kernel", "expert_mlp dx (dh W1^T)", one, 4, 3),
                ("_weight_gradient_kernel", "expert_mlp dW2 (a^T dout)", one, 2, 0),
                ("_weight_gradient_kernel", "expert_mlp dW1 (x^T dh)", one, 2, 1),
            ],
        )
        workload = workloads.linear_cross_entropy("C=768", 8192, 768)
        one = workload.flops[0]
        found["linear_cross_entropy"] = (
            workload,
            [
                ("_lse_kernel", "linear_cross_entropy lse", one, 1, 0),
                ("_dlogits_kernel", "linear_cross_entropy dlogits", one, 1, 0),
                ("_gemm_kernel", "linear_cross_entropy dx", one, 2, 0),
                ("_gemm_kernel", "linear_cross_entropy dweight", one, 2, 1),
            ],
        )
    rows, F = (8, 64) if kit.rehearse else (16384, 3072)
    workload = workloads.bias_gelu("", rows, F)
    found["bias_gelu"] = (
        workload,
        [
            ("_forward_kernel", "bias_gelu_forward", 0.0, 1, 0),
            ("_backward_kernel", "bias_gelu_backward", 0.0, 1, 0),
        ],
    )
    return found


def compare_bounds(kit: Kit, workload: workloads.Workload, kernels: list[tuple]) -> None:
    """The share of the peak that each kernel reaches, from the trace of one call, beside what the audit allows."""
    claims, sheet = published.claims(kit.device.arch), data_sheet(kit.device.name)
    peak = sheet.bf16_flops if sheet else None
    roofline = kit.roofline()
    times = kernel_times(kit, workload)
    for name, case, flops, every, first in kernels:
        launches = [seconds for kernel, seconds in times if kernel == name][first::every]
        if not launches:
            kit.finding(f"{case}: no launch of {name} is in the trace, which has {sorted({k for k, _ in times})}", case)
            continue
        seconds, bound = sum(launches), claims[case].bound if case in claims else None
        if flops:
            share = flops / seconds / peak if peak else None
            measured = flops / seconds / roofline.flops_per_s if roofline else None
        else:
            moved = 2 * workload.elements["backward" in case]  # bytes of bf16: (forward, backward)
            share, measured = None, moved / seconds / roofline.bytes_per_s if roofline else None
        kit.figure(
            f"bound {case}",
            seconds,
            "s",
            share_of_peak=share,
            share_of_roof=measured,
            bound=bound,
            launches=len(launches),
        )
        if share is not None and bound is not None and share > 1.02 * bound:
            kit.finding(f"{case}: reaches {share:.2f} of the peak, above the audit's upper bound of {bound:.2f}", case)


def kernel_times(kit: Kit, workload: workloads.Workload) -> list[tuple[str, float]]:
    """(kernel, seconds) of each launch of one forward and backward, in order."""
    inputs = place(workload.inputs(torch.Generator().manual_seed(0), torch.bfloat16), kit.torch_device)
    ops = triton_ops() if kit.rehearse else fused

    def both(call: Callable = workload.call) -> None:
        outputs = call(ops, inputs)
        gradients_of(outputs, inputs, cotangents_for(outputs, torch.Generator().manual_seed(1)))

    if kit.rehearse:
        times: list[tuple[str, float]] = []
        with rehearsal.compiling_driver() as driver:
            driver._launch = lambda source, metadata, args: times.append((metadata.name, 1e-6))
            both()
        return times
    both()  # warm
    events = trace.record(both, kit.scratch / "bounds.json.gz", on_gpu=True)
    return [(span.name, span.seconds) for span in trace.kernels(events, on_gpu=True)]
