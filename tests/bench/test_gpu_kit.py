"""bench/gpu_kit, in this process: what each part does with what goes wrong, and how lines become a report."""

import dataclasses
import functools

import pytest
import torch

from heiretsu.bench import gpu, rivals, workloads
from heiretsu.bench.gpu_kit import facts, fast, large, lines, plan, published, rehearsal, report, targets, trace, worker
from heiretsu.bench.gpu_kit.kit import Item, Kit
from heiretsu.bench.gpu_kit.record import FILE, Reader, Record, read
from heiretsu.bench.measure import COMPILED, OURS
from heiretsu.kernels import fused

if not fused.HAS_TRITON:
    pytest.skip("the kit judges Triton kernels", allow_module_level=True)


from heiretsu.bench.gpu_kit import proof, right, shipped
from heiretsu.kernels.recording import recording
from heiretsu.offgpu.audit.calls import configurations
from heiretsu.offgpu.machines import MACHINES
from tests.kernels.cases import all_cases
from tests.kernels.forms import INTERPRETED
from tests.kernels.parity import run

compiles = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")


@pytest.fixture
def kit(tmp_path):
    return make_kit(tmp_path)


def make_kit(folder, part="right", seconds=600.0) -> Kit:
    return Kit(folder, folder, rehearsal.device(), True, seconds, Record(folder, part, "group"))


def case_of(op, name):
    return next(case for case in all_cases() if (case.op, case.name) == (op, name))


def work(kit, **tasks) -> list[dict]:
    """Run these items as a worker does; the lines."""
    assert worker.work(kit, [Item(name, task) for name, task in tasks.items()]) == 0
    return read(kit.out)


def raise_(error):
    raise error


# ---- what goes wrong


def test_a_broken_kernel_comes_first_in_the_summary_and_ends_the_run_with_status_1(kit, monkeypatch, capsys):
    broken = case_of("bias_gelu", "whole tiles")
    monkeypatch.setattr(
        fused, "bias_gelu", lambda x, bias: torch.nn.functional.gelu(x + bias, approximate="tanh") * 1.01
    )
    work(
        kit,
        slow=lambda: kit.failure("over time", "it hung"),
        row=functools.partial(right.parity, kit, broken, torch.float32),
        good=functools.partial(right.parity, kit, case_of("route", "2 of 8"), torch.float32),
    )
    assert gpu.finish(kit.out) == 1
    summary = capsys.readouterr().out.strip().splitlines()
    first = next(i for i, line in enumerate(summary) if line.startswith("FAILURES"))
    assert summary[first] == "FAILURES: 2"
    assert summary[first + 1].startswith("  right: row: wrong: bias_gelu/whole tiles in float32")
    assert "slow: over time: it hung" in summary[first + 2]
    assert any("1 of 1 checks hold" in line for line in summary)


def test_a_run_without_a_failure_ends_with_status_0(kit):
    work(kit, row=functools.partial(right.parity, kit, case_of("route", "2 of 8"), torch.float32))
    assert gpu.finish(kit.out) == 0


def test_out_of_memory_is_written_down_and_the_rest_goes_on(kit):
    found = work(
        kit, large=lambda: raise_(torch.OutOfMemoryError("tried to allocate 80 GiB")), small=lambda: kit.check(True)
    )
    assert [(f["name"], f["kind"]) for f in lines.failures(found)] == [("large", "out of memory")]
    assert [check["name"] for check in lines.of(found, "check")] == ["small"]


def test_a_device_that_no_longer_answers_ends_the_process_for_another_to_go_on(kit, monkeypatch):
    items = [Item("illegal access", lambda: raise_(RuntimeError("CUDA error"))), Item("next", lambda: kit.check(True))]
    monkeypatch.setattr(kit.device, "is_well", lambda: False)
    assert worker.work(kit, items) == worker.SICK
    monkeypatch.undo()
    assert worker.work(kit, items) == 0  # as the next process does
    found = read(kit.out)
    assert [(f["name"], f["kind"]) for f in lines.failures(found)] == [("illegal access", "fault")]
    assert [line["name"] for line in lines.of(found, "begin")] == ["illegal access", "next"]
    assert lines.of(found, "check")[0]["name"] == "next"


def test_nothing_begins_behind_the_time_and_what_is_left_is_said(tmp_path):
    late = make_kit(tmp_path, seconds=-1.0)
    found = work(late, a=lambda: raise_(AssertionError("ran")), b=lambda: None)
    assert [line["what"] for line in found] == ["absent"]
    text = report.summarise(found).text
    assert "out of time:" in text and "2 of 2 items" in text


def test_a_launch_that_gives_other_bits_is_a_race(kit, monkeypatch):
    flips = iter(range(1000))

    def racy(x, bias):
        return x * 1.0 + bias + next(flips) * 1e-3

    monkeypatch.setattr(right, "op_of", lambda case: racy)
    monkeypatch.setattr(kit, "rehearse", False)
    found = work(kit, again=functools.partial(right.again, kit, case_of("bias_gelu", "whole tiles"), torch.float32))
    (failure,) = lines.failures(found)
    assert failure["kind"] == "wrong" and "launch 2 gives other bits than the first in out" in failure["detail"]


def test_an_absent_package_is_left_out_with_a_word(kit, monkeypatch):
    real = facts.importlib.util.find_spec
    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda name: None if name == "tqdm" else real(name))
    work(kit, machine=lambda: facts.machine(kit))
    absent = {line["name"]: line["why"] for line in lines.of(read(kit.out), "absent")}
    assert absent["tqdm"] == "not installed (train.py's progress bar)"
    assert "tqdm" in report.summarise(read(kit.out)).text


def test_a_rival_that_cannot_run_gets_no_number_and_fails_nothing(kit, monkeypatch):
    monkeypatch.setattr(
        rivals, "on_gpu", lambda workload: {"other": lambda inputs: raise_(RuntimeError("needs sm_100"))}
    )
    workload = workloads.bias_gelu("tiny", 8, 32)
    monkeypatch.setattr(fast, "with_compiled_plain", lambda workload: False)
    found = work(kit, time=lambda: fast.time_one(kit, workload), warm=lambda: fast.warm(kit, workload))
    problems = {line["implementation"]: line["problem"] for line in lines.of(found, "figure")}
    assert problems == {"plain": "", "fused": "", "other": "RuntimeError: needs sm_100"}
    assert lines.failures(found) == []
    assert "no number: RuntimeError: needs sm_100" in report.fast_section([{**f, "part": "fast"} for f in found])


def test_an_op_of_ours_that_is_wrong_is_a_failure_of_the_timing_too(kit, monkeypatch):
    from heiretsu.bench import measure

    monkeypatch.setattr(measure, "implementations", lambda *_: {OURS: lambda inputs: (inputs["x"] * 0.0,)})
    monkeypatch.setattr(rivals, "on_gpu", lambda workload: {})
    found = work(kit, time=lambda: fast.time_one(kit, workloads.bias_gelu("tiny", 8, 32)))
    assert lines.failures(found)[0]["kind"] == "wrong"


@pytest.mark.parametrize(
    "text, status, clean",
    [
        ("row a\n========= ERROR SUMMARY: 0 errors", 0, True),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, True),
        ("========= Invalid __global__ read of size 2\n========= ERROR SUMMARY: 3 errors", 86, False),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 86, False),
        ("Traceback ...\n========= ERROR SUMMARY: 0 errors", 1, False),
        ("========= Error: Device not supported. Please refer to the documentation", 1, None),
    ],
)
def test_what_a_sanitizer_says_is_read(text, status, clean):
    found, problem = right.verdict(text, status)
    assert found is clean and bool(problem) == (clean is False)


# ---- offsets


@pytest.mark.parametrize("dim", [0, 1])
def test_a_far_tensor_has_the_same_values_beyond_the_span(dim):
    x = torch.randn(5, 3, 4)
    y = large.far(x, dim, span=1000)
    assert torch.equal(x, y) and (x.shape[dim] - 1) * y.stride(dim) > 1000 and y.stride(dim) % 16 == 0


def test_an_offset_that_wraps_around_is_seen(kit, monkeypatch):
    def wraps(x, bias):
        if x.stride(0) > 100:  # what int32 does to a large product
            x = torch.cat([x[:-1], x[:1]])
        return torch.nn.functional.gelu(x + bias, approximate="tanh")

    case = case_of("bias_gelu", "short tails")
    large.check_far(kit, case, torch.bfloat16, "x", 0)
    monkeypatch.setattr(fused, "bias_gelu", wraps)
    with pytest.raises(AssertionError, match="with x strided over .* elements in dim 0: output 0 is off by"):
        large.check_far(kit, case, torch.bfloat16, "x", 0)


@pytest.mark.parametrize("op", ["bias_gelu", "dropout", "route", "linear_cross_entropy"])
def test_a_wrong_end_of_a_large_tensor_is_seen(kit, monkeypatch, op):
    whole = next(whole for whole in large.wholes(large.REHEARSED_SPAN) if whole.op == op)
    large.check_whole(kit, whole)
    real = getattr(fused, op)

    def wrong(*args, **kwargs):
        outputs = real(*args, **kwargs)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if len(first) > large.TAIL:
            first = torch.cat([first[:-1], first[:1] + 1])
        return (first, *outputs[1:]) if isinstance(outputs, tuple) else first

    monkeypatch.setattr(fused, op, wrong)
    with pytest.raises(AssertionError, match=f"in the last {large.TAIL} of"):
        large.check_whole(kit, whole)


def test_a_large_weight_that_is_read_at_the_wrong_place_is_seen(kit, monkeypatch):
    for op in ("expert_mlp", "linear_cross_entropy"):
        large.check_large_weights(kit, op)
    real = fused.expert_mlp

    def wrong(experts, w1, **more):
        return real(experts=experts - int(len(w1) > 2), w1=w1, **more)

    monkeypatch.setattr(fused, "expert_mlp", wrong)
    with pytest.raises(AssertionError):
        large.check_large_weights(kit, "expert_mlp")


# ---- what ships


@compiles
@pytest.mark.parametrize("arch", MACHINES)
def test_the_cases_launch_every_configuration_that_ships_and_only_kernels_that_are_audited(arch):
    """Host code alone: what would be launched is noted, and nothing is compiled."""
    table = MACHINES[arch].kernel_class
    with recording(arch=table) as record:
        for case in shipped.cases(table):
            for dtype in case.dtypes:
                run(case, dtype, proof.forms.triton_form(case.op))
    entries = {shipped.title(entry) for entry in record.entries}
    assert entries == set(shipped.every_title(table)), "bench/gpu_kit/shipped.py has no case for one of them"
    launched = {launch.kernel for launch in record.launches}
    audited = {case.fn for case in configurations(MACHINES[arch])}
    missing = [fn.__name__ for fn in launched - audited]
    assert launched and not missing, f"no call in offgpu/audit/calls.py launches {missing}"


@compiles
@pytest.mark.parametrize("arch", MACHINES)
def test_the_published_audit_is_read_whole(arch):
    claims = published.claims(arch)
    assert claims.keys() == {case.name for case in configurations(MACHINES[arch])}
    assert claims["bias_gelu_forward"].warps == 4 and claims["bias_gelu_forward"].bound > 1


def test_a_launch_that_ships_and_was_never_made_is_a_failure():
    def of(what, name, **more):
        return {"part": "right", "group": "rows", "worker": 0, "time": 0, "what": what, "name": name, **more}

    wanted = of("fact", "shipped launches", value=["attention_dq to 64", "attention_dq to 256"])
    check = of("check", "shipped a", ok=True, launched=["attention_dq to 64"])
    done = [of("begin", "shipped a"), check, of("end", "shipped a")]
    assert "attention_dq to 256" in lines.failures([wanted, *done])[0]["detail"]
    assert lines.failures([wanted, done[0]]) == []  # it is not known, for the case did not end


# ---- the proof


def test_differences_of_bits_are_counted_and_sized():
    x = torch.tensor([1.0, 2.0, float("nan")])
    assert proof.difference(x, x.clone()) == ""
    assert proof.difference(torch.tensor([1.0, 2.0 + 2**-22, float("nan")]), x).startswith(
        "1 of 3 elements, by at most"
    )
    assert proof.difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == "1 of 2 elements"
    assert proof.difference(None, None) == "" and proof.difference(x, None)


@compiles
def test_resources_are_those_of_the_machine_code_and_a_difference_is_a_finding(kit, monkeypatch):
    (case,) = [case for case in configurations(MACHINES["sm_90"]) if case.name == "bias_gelu_forward"]
    work(kit, compiled=lambda: proof.compare_resources(kit, case))
    (figure,) = lines.of(read(kit.out), "figure")
    assert [figure["value"], figure["spill_bytes"], figure["shared_bytes"]] == figure["read"] and figure["value"] > 16
    assert lines.of(read(kit.out), "finding") == []
    real = proof.resources
    monkeypatch.setattr(proof, "resources", lambda compiled: dataclasses.replace(real(compiled), spill_bytes=64))
    work(kit, again=lambda: proof.compare_resources(kit, case))
    details = [line["detail"] for line in lines.of(read(kit.out), "finding")]
    assert any("the driver says" in d for d in details) and any(
        "spills 64 bytes here, 0 in the published" in d for d in details
    )


# ---- traces


def event(name, begin, length, cat="kernel"):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length}


def test_a_trace_is_read_by_whose_kernels_ran_and_who_waited():
    events = [
        event("ampere_bf16_s16816gemm_128x128", 0, 100),
        event("_forward_kernel", 100, 50),
        event("ncclDevKernel_AllReduce", 120, 80),
        event("triton_poi_fused_add_0", 150, 30),
        event("vectorized_elementwise_kernel", 300, 20),
        event("cudaStreamSynchronize", 310, 5, "cuda_runtime"),
        event("cudaLaunchKernel", 90, 5, "cuda_runtime"),
    ]
    spans = trace.kernels(events, on_gpu=True)
    microseconds = {whose: round(1e6 * s) for whose, s in trace.shares(spans, {"_forward_kernel"}).items()}
    assert microseconds == {"ours": 50, "matrix library": 100, "communication": 80, "inductor": 30, "other": 20}
    assert trace.host_waits(events, on_gpu=True) == {"cudaStreamSynchronize": 1}
    seconds, share = trace.overlap(spans)
    assert round(1e6 * seconds) == 80 and share == pytest.approx(60 / 80)  # 120..150 and 150..180 of 120..200


def test_without_a_gpu_the_outermost_operators_stand_for_kernels():
    events = [
        event("aten::linear", 0, 10, "cpu_op"),
        event("aten::mm", 2, 5, "cpu_op"),
        event("aten::add", 10, 1, "cpu_op"),
    ]
    assert [span.name for span in trace.kernels(events, on_gpu=False)] == ["aten::linear", "aten::add"]


# ---- targets and report


def timed(op, series, size, implementation, forward, both, peak=100, share=0.5):
    passes = {}
    for name, median in (("forward", forward), ("forward+backward", both)):
        passes[name] = {"median_s": median, "low_s": median, "high_s": median, "rate": 1e12, "rate_unit": "FLOP/s"}
        passes[name] |= {"times_plain": 2.0, "share_of_roof": share}
    return {
        "part": "fast", "group": "time", "worker": 0, "time": 0, "what": "figure", "name": f"{op} {series} T={size}",
        "value": both, "unit": "s", "op": op, "series": series, "size_name": "T", "size": size, "flops": [1e9, 2e9],
        "elements": [1e6, 2e6], "implementation": implementation, "passes": passes, "peak_bytes": peak, "problem": "",
    }  # fmt: skip


def test_targets_are_reached_missed_or_not_measured():
    found = [
        timed("attention", "H=16 D=64", 4096, "fused", 1.0, 3.0),
        timed("attention", "H=16 D=64", 4096, "SDPA flash", 1.1, 2.8),  # backward 1.7 of our 2.0
        timed("linear_cross_entropy", "C=768", 8192, "fused", 1.0, 3.0, peak=5),
        timed("linear_cross_entropy", "C=768", 8192, COMPILED, 1.0, 3.0, peak=100),
    ]
    verdicts = {target.name: target.verdict(found) for target in targets.TARGETS}
    assert verdicts["attention forward D=64 4k: x SDPA flash"] == ("reached", pytest.approx(1.1))
    assert verdicts["attention backward D=64 4k: x SDPA flash"] == ("missed", pytest.approx(0.85))
    assert verdicts["attention forward D=128 4k: x SDPA flash"] == ("not measured", None)
    assert verdicts["linear_cross_entropy: memory / compiled plain"] == ("reached", 0.05)
    assert "missed: attention backward D=64 4k: x SDPA flash 0.85 (>= 0.90)" in report.summarise(found).text


def test_every_target_names_a_shape_that_is_timed_and_a_rival_that_is_there():
    named = {(w.op, w.series, w.size): {"fused", COMPILED, *rivals.on_gpu(w)} for w in fast.chosen(rehearse=False)}
    found = [timed(op, series, size, name, 1.0, 2.0) for (op, series, size), names in named.items() for name in names]
    missing = [t.name for t in targets.TARGETS if t.verdict(found)[0] == "not measured"]
    assert missing == ["GPT-2 step: x plain compiled"]


def test_the_summary_stays_on_one_screen(kit):
    for number in range(100):
        kit.failure("wrong", "x" * 500, f"row {number}")
        kit.finding("y" * 500, f"case {number}")
        kit.absent(f"package {number}", "not installed")
    text = report.write(kit.out).text.splitlines()
    assert len(text) <= 45 and max(map(len, text)) <= report.WIDTH
    assert text[0] == "FAILURES: 100" and "  ... and 88 more, in report.md" in text
    assert "row 99" in (kit.out / "report.md").read_text()


def test_a_half_written_line_is_left_for_later_and_a_broken_one_is_skipped(tmp_path):
    Record(tmp_path, "fast").write("fact", "a", value=1)
    with open(tmp_path / FILE, "ab") as file:
        file.write(b'{"part": "fast", "what": "fa\nct"}\n{"part": "fast", "wh')
    reader = Reader(tmp_path)
    assert [line["name"] for line in reader.new()] == ["a"]
    with open(tmp_path / FILE, "ab") as file:
        file.write(b'at": "fact", "name": "b", "value": 2}\n')
    assert [line["name"] for line in reader.new()] == ["b"]


def test_the_plan_knows_every_part_and_a_rehearsal_of_each():
    import importlib

    for part, how in plan.PARTS.items():
        assert hasattr(importlib.import_module(f"heiretsu.bench.gpu_kit.{part}"), "items"), part
        assert how.minutes > 0 and all(group.rehearsed for phase in how.phases for group in phase)
