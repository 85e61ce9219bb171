"""--autotune: the kernel calls of one run, recorded where it makes them, and measured before it trains.

Every rank records one real accumulation of the first batch, which touches no parameter. Rank 0 gathers the calls, makes
the inputs of each again (`recording.Call.inputs`), and measures the kernels that it launches, forward and backward; all
ranks then launch what it chose. So no list here says what the model calls, or what a rank of the mesh sees.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from heiretsu.kernels import fused
from heiretsu.kernels.control import CONTROL
from heiretsu.kernels.recording import Call, Look, recording
from heiretsu.parallel.collectives import gather_objects
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.pipeline import Microbatch

if fused.HAS_TRITON:
    from heiretsu.kernels.gpu import autotune

Run = Callable[[], dict[str, torch.Tensor]]


def tune_kernels(engine: Engine, batches: Sequence[Microbatch]) -> None:
    """Rank 0 measures while the others wait, and every rank launches what it chose. batches: this rank's of a step."""
    mesh = engine.mesh
    if mesh.rank == 0 and mesh.world.size > 1:
        print(f"autotune: rank 0 measures for all {mesh.world.size} ranks, which wait for it", flush=True)
    calls = record_calls(engine, batches)
    chosen = [autotune.tune(call_runs(calls, fused, mesh.device), mesh.device) if mesh.rank == 0 else None]
    if mesh.world.size > 1:
        dist.broadcast_object_list(chosen, src=0)
    CONTROL.chosen.update(chosen[0])
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()  # the training's blocks have other sizes


def record_calls(engine: Engine, batches: Sequence[Microbatch]) -> list[Call]:
    """The distinct calls of all ranks in a forward and backward pass of the batches, the dearest first.

    How dear: elements of the tensors times how often it is called, which no clock is needed for.
    """
    # From compiled blocks no call could be seen: for once, they run as they are written.
    with recording() as record, torch.compiler.set_stance("force_eager"):
        engine.accumulate(batches)
    largest, times = distinct(record.calls)
    for theirs, theirs_times in gather_objects((largest, times), engine.mesh.world)[1:]:
        largest, _ = distinct([*largest.values(), *theirs.values()])
        times += theirs_times
    return sorted(largest.values(), key=lambda call: -call.elements * times[_kind(call)])


def distinct(calls: Iterable[Call]) -> tuple[dict[str, Call], Counter[str]]:
    """One call of each kind, that of the most elements, and how many there were."""
    largest: dict[str, Call] = {}
    times: Counter[str] = Counter()
    for call in calls:
        kind = _kind(call)
        times[kind] += 1
        largest[kind] = max(largest.get(kind, call), call, key=lambda one: one.elements)
    return largest, times


def _kind(call: Call) -> str:
    """The call's words, but for the length that its tensors of integers have: tokens, of which the router decides how
    many reach an expert's rank."""
    lengths = {look.shape[:1] for look in call.looks.values() if not look.dtype.is_floating_point}
    arguments = [
        (name, replace(value, shape=value.shape[1:], stride=value.stride[1:]))
        if isinstance(value, Look) and value.shape[:1] in lengths
        else (name, value)
        for name, value in call.arguments
    ]
    return str(replace(call, arguments=tuple(arguments)))


def call_runs(calls: Iterable[Call], ops, device: torch.device) -> dict[str, Callable[[], Run]]:
    """{call in words: a function that makes its inputs}, as `autotune.tune` takes them.

    That function returns another one, which runs the op of `ops`, forward and backward, and returns every output and
    gradient by name.
    """
    return {str(call): functools.partial(_forward_and_backward, call, ops, device) for call in calls}


def _forward_and_backward(call: Call, ops, device: torch.device) -> Run:
    generator = torch.Generator(device).manual_seed(0)
    inputs = call.inputs(device, generator)
    leaves = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    douts: list[torch.Tensor] = []

    def run() -> dict[str, torch.Tensor]:
        result = getattr(ops, call.op)(**inputs)
        outputs = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        differentiable = [output for output in outputs if output.requires_grad]
        if not douts:  # the same for every run
            douts.extend(torch.randn_like(output) for output in differentiable)
        grads = torch.autograd.grad(differentiable, list(leaves.values()), douts) if leaves else ()
        named = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        return named | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    return run
