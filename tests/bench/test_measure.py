"""The benchmark measures what it says: parity first, the same work for all, losers and failures printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from heiretsu.bench import charts, kernels, measure, memory, result_tables, rivals, tables, train, workloads
from heiretsu.bench.parity import Judge
from heiretsu.bench.timing import Roofline, Timing, in_turns
from heiretsu.kernels import plain
from heiretsu.run.options import parse_args

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
TINY = (
    workloads.attention("H=2 D=16", 1, 2, 32, 16),
    workloads.bias_gelu("tiny", 8, 32),
    workloads.layer_norm("tiny", 8, 32),
    workloads.dropout("tiny", 2, 4, 16),
    workloads.route("tiny", 16, 4, 2),
    workloads.expert_mlp("tiny", 16, 16, 32, 4, "skewed"),
    workloads.linear_cross_entropy("tiny", 8, 16, V=50),
)
ALL_OPS = {workload.op for workload in TINY}


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "bench" / script), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def inputs_of(workload, dtype=torch.float32):
    return workload.inputs(torch.Generator().manual_seed(0), dtype)


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.op)
def test_judge_accepts_plain_and_refuses_what_is_wrong(workload):
    judge = Judge(workload, inputs_of(workload), torch.float32)

    def scaled(inputs):
        return tuple(1.01 * out for out in workload.call(plain, inputs))

    def broken(inputs):
        return tuple(out * float("nan") for out in workload.call(plain, inputs))

    assert judge.problem(lambda inputs: workload.call(plain, inputs)) == ""
    assert "output 0 is off" in judge.problem(scaled)
    assert "output 0 is off" in judge.problem(broken)


def test_judge_refuses_a_wrong_gradient_behind_a_right_output():
    workload = TINY[1]

    def half_gradient(inputs):
        (out,) = workload.call(plain, inputs)
        return (out.detach() + 0.5 * (out - out.detach()),)

    problem = Judge(workload, inputs_of(workload), torch.float32).problem(half_gradient)
    assert "dx is off" in problem and "dbias is off" in problem and "output" not in problem


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.op)
def test_torch_rivals_compute_the_same_op(workload):
    judge = Judge(workload, inputs_of(workload), torch.float32)
    for name, rival in rivals.for_workload(workload, CPU).items():
        assert judge.problem(rival) == "", name


def test_rivals_with_other_dropout_masks_stay_away():
    assert "SDPA" in rivals.for_workload(TINY[0], CPU)
    assert rivals.for_workload(workloads.attention("H=2 D=16 dropout", 1, 2, 32, 16, 0.1), CPU) == {}


def test_attention_is_judged_on_a_part_where_the_whole_is_too_large():
    small, large = workloads.attention("", 2, 4, 64, 8), workloads.attention("", 2, 4, 8192, 1)
    inputs = inputs_of(small)
    assert small.part(inputs) is inputs
    assert large.part(inputs_of(large))["qkv"].shape == (1, 8192, 3, 1)
    grouped = workloads.attention("", 2, 8, 4096, 1, Hkv=2)
    part = grouped.part(inputs_of(grouped))
    assert (part["qkv"].shape, part["key_heads"]) == ((1, 4096, 6, 1), 1)  # 4 query heads, their key and value


@pytest.mark.parametrize("make", [workloads.on_cpu, workloads.on_gpu])
def test_every_op_is_measured_and_cases_have_names_of_their_own(make):
    for quick in (True, False):
        names = [(workload.op, workload.name) for workload in make(quick)]
        assert len(set(names)) == len(names)
        assert {op for op, _ in names} == ALL_OPS
    assert len(make(True)) < len(make(False))


@pytest.mark.parametrize("balance", ["balanced", "skewed", "one-hot"])
def test_routing_of_the_cases(balance):
    chosen = workloads.experts_of_tokens(balance, 400, 8, 2, torch.Generator().manual_seed(0))
    assert chosen.shape == (400, 2)
    assert (chosen[:, 0] != chosen[:, 1]).all()
    loads = chosen.flatten().bincount(minlength=8)
    if balance == "balanced":
        assert loads.tolist() == [100] * 8
    elif balance == "skewed":
        assert loads[0] > 3 * loads[7] > 0
    else:
        assert loads.tolist() == [400, 400, 0, 0, 0, 0, 0, 0]


def test_rounds_alternate_and_the_order_rotates():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = in_turns(functions, CPU, seconds=0.0, rounds=(3, 10))
    assert "".join(calls) == "abcbcacab"
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_cpu_clock_is_that_of_the_process_and_wants_one_thread():
    ticks = iter(range(100))
    timings = in_turns({"a": lambda: None}, CPU, seconds=0.0, rounds=(3, 3), clock=lambda: next(ticks))
    assert timings["a"].samples == (1, 1, 1)
    args = kernels.build_parser().parse_args(["--clock", "cpu", "--threads", "2"])
    with pytest.raises(ValueError, match="--clock cpu .* use it with --threads 1"):
        kernels.run_measurements(args)


def test_report_names_the_command_without_the_files_of_this_machine():
    flags = "--op route --quick --threads 1 --clock cpu --json /here/x.json --plot /here --output /here/x.md"
    args = kernels.build_parser().parse_args(flags.split())
    expected = "python bench/kernels.py --op route --quick --threads 1 --clock cpu --output FILE"
    assert kernels.command_line(args) == expected


def test_speedup_is_the_median_over_rounds_so_that_drift_cancels():
    slow, fast = Timing.of([2.0, 4.0, 8.0]), Timing.of([1.0, 2.0, 4.0])
    assert fast.speedup_over(slow) == 2.0
    assert (slow.median, slow.low, slow.high) == (4.0, 3.0, 6.0)


def test_roofline_takes_the_slower_of_compute_and_memory():
    roof = Roofline(bytes_per_s=10.0, flops_per_s=100.0)
    assert (roof.seconds(1000, 10), roof.seconds(100, 50)) == (10.0, 5.0)


def test_wrong_implementation_gets_no_number(monkeypatch):
    workload = TINY[1]
    wrong = SimpleNamespace(bias_gelu=lambda x, bias: plain.bias_gelu(x, bias) + 0.1)
    monkeypatch.setattr(measure, "fused", wrong)
    found = measure.measure(workload, CPU, torch.float32, Roofline(1e9, 1e9), quick=True, compiled=False)
    ours = next(result for result in found if result.implementation == measure.OURS)
    assert ours.timings == {} and "off by" in ours.problem
    text = result_tables.table(found)
    assert "no number: output 0 is off by" in text
    assert next(result for result in found if result.implementation == measure.BASELINE).speedups == dict.fromkeys(
        measure.PASSES, 1.0
    )


def test_peak_memory_of_a_call_is_seen():
    peak = memory.peak_resident_over(lambda: torch.ones(64 * 2**20 // 4))
    if sys.platform == "linux":
        assert 60 * 2**20 < peak < 80 * 2**20
    else:
        assert peak is None


def made_up_results():
    found = []
    for workload in (workloads.bias_gelu("made up", 64, F) for F in (1024, 2048, 4096)):
        for name, factor in (("plain", 1.0), ("fused", 0.5), ("compiled plain", 1.3), ("other", 0.7)):
            seconds = factor * workload.size * 1e-6
            timing = Timing.of([seconds, 1.1 * seconds, 0.9 * seconds])
            both = dict.fromkeys(measure.PASSES, timing)
            speedups, shares = dict.fromkeys(measure.PASSES, 1 / factor), dict.fromkeys(measure.PASSES, 0.5)
            found.append(measure.Result(workload, name, both, speedups, shares, 2, 2**20))
    found.append(measure.Result(TINY[0], "fused", {}, {}, {}, 2, None, "out of memory"))
    return found


FACTS = {"device": "CPU, made up", "cpu": "made up", "torch": "2", "commit": "0"}


def test_charts_are_drawn(tmp_path):
    paths = charts.draw(made_up_results(), Roofline(1e10, 1e12), FACTS, torch.bfloat16, tmp_path / "charts")
    assert [path.name for path in paths] == ["time.png", "speedup.png", "roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_tables_show_losers_and_failures():
    text = result_tables.markdown(made_up_results(), FACTS, Roofline(1e10, 1e12), torch.bfloat16, "the command")
    row = next(line for line in text.splitlines() if "F=1024" in line and "compiled plain" in line)
    assert "| 0.77 |" in row
    assert "no number: out of memory" in text
    assert "copy 10 GB/s, bfloat16 matrix product 1 TFLOP/s" in text


def test_json_has_every_figure():
    document = result_tables.as_json(made_up_results(), FACTS, Roofline(1e10, 1e12), torch.bfloat16)
    row = document["results"][1]
    assert (row["op"], row["implementation"], row["size"]) == ("bias_gelu", "fused", 1024)
    assert row["forward"]["bytes"] == 2 * 64 * 1024 * 2
    assert row["forward+backward"]["times_plain"] == 2.0
    assert json.loads(json.dumps(document)) == document


def test_table_columns_are_aligned():
    lines = tables.aligned(["case", "ms"], [["2k", "1.5"], ["longer", "10"]]).splitlines()
    assert lines == ["case     ms", "------  ---", "2k      1.5", "longer   10"]


def test_one_op_from_the_command_line(tmp_path):
    file = tmp_path / "route.json"
    done = run("kernels.py", "--op", "route", "--quick", "--no-compile", "--device", "cpu", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert {row["op"] for row in document["results"]} == {"route"}
    timed = {row["implementation"]: row for row in document["results"] if not row["problem"]}
    assert timed["fused"]["forward"]["median_ms"] > 0
    assert document["machine"]["commit"] and document["roofline"]["flops_per_s"] > 1e8


def test_unknown_op_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="--op softmax: the ops are attention, .*linear_cross_entropy"):
        kernels.choose(workloads.on_cpu(True), ["route", "softmax"])
    assert {workload.op for workload in kernels.choose(workloads.on_cpu(True), ["route"])} == {"route"}


def test_training_step_from_the_command_line(tmp_path):
    file = tmp_path / "train.json"
    sizes = "--n_layer 1 --n_head 2 --n_embed 32 --block_size 32 --batch_size 2".split()
    variants = "plain,fused,fused+bf16"
    done = run("train.py", *sizes, "--variants", variants, "--rounds", 2, "--device", "cpu", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["variant"]: row for row in json.loads(file.read_text())["variants"]}
    assert list(rows) == variants.split(",")
    assert rows["plain"]["first_loss"] == pytest.approx(rows["fused"]["first_loss"], rel=1e-4)
    assert rows["plain"]["times_first"] == 1.0
    tokens_per_step = 2 * 32
    for row in rows.values():
        assert row["tokens_per_s"] == pytest.approx(tokens_per_step / row["median_ms"] * 1e3)


def test_variants_set_the_flags_that_they_name():
    base = parse_args([])
    config = train.variant("fused+bf16+compile", base).config
    assert (config.fused, config.amp, config.compile) == (True, "bf16", True)
    config = train.variant("plain", base).config
    assert (config.fused, config.amp, config.compile) == (False, "none", False)
    with pytest.raises(ValueError, match="--variants plain.quick: quick is none of"):
        train.variant("plain+quick", base)
