"""Several GPUs of one machine: topologies over NCCL against one process, throughput against one GPU, overlap."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from heiretsu.bench.gpu_kit import trace
from heiretsu.bench.gpu_kit.kit import LONG_S, ROOT, Item, Kit
from heiretsu.bench.gpu_kit.train import TINY, data_folder, run_program

AXES = ("dp", "tp", "pp", "ep")
STEPS = 20


def items(kit: Kit, group: str) -> list[Item]:
    gpus = kit.device.cuda.device_count()
    if gpus < 2:
        return [Item("one GPU", lambda: kit.absent("several GPUs", "this machine has one"))]

    def item(name, task, *arguments):
        return Item(name, functools.partial(task, kit, *arguments), LONG_S)

    pairs = [item(f"parity of {axis} 2", parity, axis) for axis in AXES]
    ranks = largest_power_of_two(gpus)
    suite = item("tests/run_full_suite.sh", suite_of_topologies, 0 if kit.rehearse else gpus)
    speeds = [item(f"speed of {name}", speed, name, flags) for name, flags in meshes(ranks).items()]
    if kit.rehearse:
        return [pairs[0], suite, speeds[0]]
    return [*pairs, speeds[0], speeds[1], suite, *speeds[2:]]


def largest_power_of_two(count: int) -> int:
    return 1 << (count.bit_length() - 1)


def meshes(ranks: int) -> dict[str, list[str]]:
    """{name: train.py's flags}: one GPU, each axis alone on all of them, and mixtures of four and more."""
    found = {"one GPU": ["--dp", "1"]}
    found |= {f"{axis} {ranks}": [f"--{axis}", str(ranks)] for axis in AXES}
    if ranks >= 4:
        found["dp x tp"] = ["--dp", str(ranks // 2), "--tp", "2"]
    if ranks >= 8:
        found["dp x tp x pp"] = ["--dp", str(ranks // 4), "--tp", "2", "--pp", "2"]
    return found


def torchrun(kit: Kit, ranks: int) -> list[str]:
    return [kit.python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def parity(kit: Kit, axis: str) -> None:
    steps = ["--steps", "2" if kit.rehearse else "10"]
    try:
        output = run_program(kit, [*torchrun(kit, 2), "tests/tests_equiv.py", f"--{axis}", "2", *steps])
    except RuntimeError as error:
        raise AssertionError(str(error)) from error  # it compares: a failure is a wrong result
    difference = re.search(r"diff=(\S+)", output)
    kit.check("OK " in output, f"the largest difference of a loss is {difference[1] if difference else 'not said'}")


def suite_of_topologies(kit: Kit, most_ranks: int) -> None:
    output = run_program(
        kit, ["bash", "tests/run_full_suite.sh"], PYTHON=kit.python, MAX_RANKS=str(most_ranks),
        **({"TRAIN_STEPS": "2"} if kit.rehearse else {}),
    )  # fmt: skip
    summary = output[output.rindex("=== Summary ===") :]
    for line in summary.splitlines():
        if line.startswith("  ") and "not run" in line:
            kit.absent(f"topology {line.split('(')[0].strip()}", line.split("(")[1].rstrip(")"))
    kit.check("FAIL (0):" in summary, summary, passed=int(re.search(r"PASS \((\d+)\)", summary)[1]))


def speed(kit: Kit, name: str, flags: list[str]) -> None:
    """tokens/s of train.py on a mesh, and from its trace how much of the communication ran beside computation."""
    ranks = 1
    for size in flags[1::2]:
        ranks *= int(size)
    folder, log = kit.scratch / f"trace-{name}", kit.scratch / f"speed-{name}.jsonl"
    model = TINY if kit.rehearse else ["--preset", "gpt2", "--block_size", "1024"]
    steps, batch = ("7", "2") if kit.rehearse else (str(STEPS), "16")
    replicas = ranks if "--ep" in flags or "--dp" in flags else 1
    command = [*(torchrun(kit, ranks) if ranks > 1 else [kit.python]), str(ROOT / "train.py"), *model, *flags]
    command += ["--device", kit.torch_device.type, "--data_dir", str(data_folder(kit)), "--max_iters", steps]
    command += ["--batch_size", batch, "--grad_accum_steps", "8" if "--pp" in flags else "1", "--log_file", str(log)]
    command += ["--fused", "--amp", "bf16", "--sample_tokens", "0", "--eval_interval", "0", "--profile", str(folder)]
    if "--ep" in flags:
        command += ["--num_experts", "8"]
    run_program(kit, command)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    rates = sorted(record["tokens_per_s"] for record in records[6:])  # behind warm-up and profile
    rate = rates[len(rates) // 2]
    kit.figure(name, rate, "tokens/s", GPUs=ranks, per_GPU=rate / ranks, replicas=replicas)
    write_overlap(kit, name, folder / "rank0.json")


def write_overlap(kit: Kit, name: str, path: Path) -> None:
    on_gpu = not kit.rehearse
    spans = trace.kernels(trace.load(path), on_gpu)
    seconds, share = trace.overlap(spans)
    kit.figure(f"{name}: communication beside computation", share, "share of its time", ms=1e3 * seconds)
