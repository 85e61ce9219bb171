"""The parts of the audit that compile nothing: control flow, pipe costs, occupancy, bars, what is recorded."""

import pickle
import re
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import SimpleNamespace

import pytest
from triton.runtime.jit import JITFunction

import heiretsu.kernels.gpu as gpu
from heiretsu.offgpu.audit import bars, model, report
from heiretsu.offgpu.audit.calls import Call, Configuration, configurations
from heiretsu.offgpu.audit.disassembly import Instruction, decode_tcgen05_shape, parse_amd
from heiretsu.offgpu.audit.loops import natural_loops
from heiretsu.offgpu.audit.pipes import access_bits, charge, mma_shape
from heiretsu.offgpu.audit.runner import Subject, subject_of
from heiretsu.offgpu.machines import KIB, MACHINES, machine
from tests.kernels import forms
from tests.offgpu.audit.audit_kernels import CALLS, double, gemm

compiles = pytest.mark.skipif(forms.INTERPRETED, reason="Triton interprets in this process")
H100, A100 = machine("sm_90"), machine("sm_80")


def code(*lines):
    """Instructions, 16 bytes apart, from "opcode operands" or "@P0 opcode operands"."""
    out = []
    for index, line in enumerate(lines):
        predicate, rest = line.split(" ", 1) if line.startswith("@") else ("", line)
        opcode, _, operands = rest.partition(" ")
        out.append(Instruction(16 * index, predicate, opcode, operands, stall=1))
    return out


def test_nested_loops_are_found_with_their_bodies():
    program = code(
        "MOV R0",
        "IADD3 R1",  # outer
        "FADD R2",  # inner
        "@P0 BRA `(.L_x_1)",
        "@P1 BRA `(.L_x_0)",
        "EXIT",
    )
    loops = dict(natural_loops(program, {".L_x_0": 16, ".L_x_1": 32}))
    assert loops == {32: {2, 3}, 16: {1, 2, 3, 4}}


def test_forward_branch_is_no_loop():
    program = code("@P0 BRA `(.L_x_0)", "FADD R0", "EXIT")
    assert natural_loops(program, {".L_x_0": 32}) == []


def test_vector_instructions_cost_their_documented_cycles():
    body = code("FFMA R0", "MUFU.EX2 R0", "FSETP.GT R0", "IMAD.WIDE R0")
    hopper = charge("here", body, H100, 4, 0, None).pipes
    assert (hopper["issue"], hopper["fma"], hopper["alu"], hopper["xu"]) == (4, 4, 2, 8)
    ampere = charge("here", body, A100, 4, 0, None).pipes
    assert ampere["fma"] == 2 * 1 + 2 * 2  # FFMA and both halves of IMAD.WIDE share 64 lanes


def test_padding_costs_an_issue_slot_only():
    region = charge("here", code("@!PT FFMA R0"), H100, 4, 0, None)
    assert (region.pipes["issue"], region.pipes["fma"]) == (1, 0)


def test_narrow_wgmma_pays_for_n_64():
    wide = charge("here", code("HGMMA.64x64x16.F32.BF16 R0, gdesc[UR4], R0"), H100, 4, 0, None)
    narrow = charge("here", code("HGMMA.64x32x16.F32.BF16 R0, gdesc[UR4], R0"), H100, 4, 0, None)
    assert narrow.flops == wide.flops / 2
    assert narrow.pipes["tensor"] == wide.pipes["tensor"] == 2 * 64 * 64 * 16 / 4096
    assert wide.pipes["smem"] == (64 * 16 + 64 * 16) * 2 / 128


def test_mma_sync_runs_at_a_share_of_the_peak_on_hopper():
    region = charge("here", code("HMMA.16816.F32.BF16 R0"), H100, 4, 0, None)
    assert region.pipes["tensor"] == pytest.approx(region.flops / 4096 / 0.63, abs=0.05)


def test_access_widths_and_mma_shapes_are_read_from_the_opcode():
    assert [access_bits(op) for op in ("LDG.E.128", "LDG.E.64", "LDG.E", "LDG.E.U16")] == [128, 64, 32, 16]
    assert mma_shape("HGMMA.64x256x16.F32.BF16") == (64, 256, 16)
    assert mma_shape("FFMA") is None
    assert decode_tcgen05_shape((128 >> 4) << 24 | (256 >> 3) << 17) == (128, 256)


def test_amd_assembly_is_parsed_without_its_comments():
    instructions, labels = parse_amd("; note\n.LBB0_1:\n\tv_exp_f32 v1, v2 ; exp\n\ts_cbranch_scc1 .LBB0_1\n")
    assert instructions == [("v_exp_f32", "v1, v2"), ("s_cbranch_scc1", ".LBB0_1")]
    assert labels == {".LBB0_1": 0}


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (255, 48 * KIB, 4, (2, 0.125, "regs")),
        (64, 100 * KIB, 8, (2, 0.25, "smem")),
        (32, 0, 32, (2, 1.0, "regs")),
        (16, 0, 1, (32, 0.5, "ctas")),
        (64, 228 * KIB, 8, (0, 0.0, "smem")),
    ],
)
def test_occupancy(registers, shared, warps, expected):
    assert model.occupancy(registers, shared, warps, H100) == expected


def test_wide_share_is_of_bytes():
    assert model.wide_share(Counter({128: 1, 32: 4})) == 0.5
    assert model.wide_share(Counter({"tma": 2})) == 1.0


def figures(**changes):
    hot = SimpleNamespace(flops=0, mma=Counter(), memory_headroom=2.0, tensor_bound=None)
    values = dict(shared_bytes=0, ctas_per_sm=4, registers=64, total_warps=4, spill_bytes=0, hot=hot, mma={}, bound=2.0)
    return SimpleNamespace(**values | dict(wide_loads=1.0, wide_stores=1.0) | changes)


CASE = Configuration("gelu forward", None, {}, {"BLOCK": 8}, num_warps=4, num_stages=1, quick=True)
BAR = bars.Bar("gelu .*", ("sm_90",), min_bound=2.2, min_wide=0.9)


def test_a_bar_holds_on_its_machines():
    assert bars.failures(CASE, figures(), H100, ()) == []
    assert bars.failures(CASE, figures(), H100, (BAR,)) == ["DRAM headroom 2.0, at least 2.2 wanted"]
    assert bars.failures(CASE, figures(bound=2.2), H100, (BAR,)) == []
    assert bars.failures(CASE, figures(), machine("sm_100"), (BAR,)) == []


def test_nothing_may_spill_that_is_not_allowed_by_name_and_machine():
    spilling = figures(spill_bytes=8)
    allowed = {("sm_90", "gelu forward"): 8}
    assert bars.failures(CASE, spilling, H100, (), {}) == ["spills 8 bytes a thread, 0 allowed"]
    assert bars.failures(CASE, spilling, H100, (), allowed) == []
    assert bars.failures(CASE, figures(spill_bytes=12), H100, (), allowed) == ["spills 12 bytes a thread, 8 allowed"]
    assert bars.failures(CASE, spilling, A100, (), allowed) == ["spills 8 bytes a thread, 0 allowed"]


def test_the_closed_form_of_a_loop_is_taken_from_the_launch_s_constants():
    expects = bars.Bar("gelu .*", loop_flops=lambda constants: 2 * constants["BLOCK"])
    hot = SimpleNamespace(flops=12, mma=Counter(), memory_headroom=None, tensor_bound=1.0)
    found = bars.failures(CASE, figures(hot=hot, mma={"HGMMA": 1}), H100, (expects,))
    assert found == ["12 FLOP an iteration of the hot loop, closed form 16"]
    hot.flops = 16
    assert bars.failures(CASE, figures(hot=hot, mma={"HGMMA": 1}), H100, (expects,)) == []
    assert bars.failures(CASE, figures(hot=hot), H100, (expects,)) == ["has a dot but no HGMMA instruction"]


def test_narrow_accesses_fall_below_a_bar():
    (text,) = bars.failures(CASE, figures(bound=3.0, wide_stores=0.5), H100, (BAR,))
    assert "50% of the stored bytes" in text


def test_a_bar_or_an_allowance_without_a_configuration_is_reported():
    assert bars.unused(["gelu forward"], "sm_90", (BAR,), {("sm_90", "gelu forward"): 8}) == []
    assert len(bars.unused(["layer norm"], "sm_90", (BAR,), {})) == 1
    assert bars.unused(["layer norm"], "sm_80", (BAR,), {("sm_90", "gelu forward"): 8}) == []
    assert len(bars.unused(["layer norm"], "sm_90", (), {("sm_90", "gelu forward"): 8})) == 1


# ---- what is compiled


@compiles
@pytest.mark.parametrize("arch", MACHINES)
def test_every_bar_and_every_allowance_has_a_configuration(arch):
    names = [case.name for case in configurations(machine(arch))]
    assert len(names) == len(set(names)) > 100
    assert bars.unused(names, arch) == []


@compiles
def test_every_kernel_of_the_library_is_audited():
    """Those that a host launches: the ones whose launches take an entry of some tiles."""
    audited = {case.fn for case in configurations(H100)}
    modules = [import_module(f"{gpu.__name__}.{found.name}") for found in iter_modules(gpu.__path__)
               if not found.name.startswith("interpreter_")]  # fmt: skip
    functions = {value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    assert {function for function in functions if function.__name__.endswith("_kernel")} == audited


@compiles
def test_code_that_two_calls_launch_is_compiled_once_and_other_code_of_one_name_is_refused():
    twice = [Call("a", double), Call("b", double)]
    assert [case.name for case in configurations(H100, twice)] == ["audit_kernels_double a"]
    with pytest.raises(ValueError, match="different code are called audit_kernels_double a"):
        configurations(H100, [Call("a", double), Call("a", partial(double, 1))])
    assert configurations(H100, [Call("a", double, only="another")]) == []


@compiles
def test_a_configuration_travels_to_another_process():
    for case in configurations(H100, CALLS):
        assert pickle.loads(pickle.dumps(case)) == case


@compiles
def test_quick_takes_every_quick_call_on_one_machine_and_the_first_of_each_file_elsewhere():
    subject = Subject([Call("slow", partial(double, 1), quick=False), Call("first", double), Call("second", gemm)])
    chosen = {quick: [(job.arch, job.name.split()[-1]) for job in report.choose(subject, ["sm_80", "sm_90"], quick)]
              for quick in (False, True)}  # fmt: skip
    assert len(chosen[False]) == 6
    assert chosen[True] == [("sm_80", "first"), ("sm_90", "first"), ("sm_90", "second")]


@compiles
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = 1", "must have CALLS, a list of heiretsu.offgpu.audit.calls.Call"),
        ("CALLS = [print]", "must have CALLS, a list of heiretsu.offgpu.audit.calls.Call"),
        (None, "there is no such file"),
    ],
)
def test_a_file_that_defines_no_calls_is_refused_in_a_line(tmp_path, text, reason):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        subject_of(str(path))


@compiles
def test_the_file_in_the_page_is_audited_under_the_names_that_it_states_bars_for(tmp_path):
    page = Path(__file__).parents[3] / "offgpu" / "README.md"
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "CALLS" in block]
    (tmp_path / "mine.py").write_text(code)
    subject = subject_of(str(tmp_path / "mine.py"))
    names = [case.name for case in configurations(H100, subject.calls)]
    assert names == ["mine_scale a million"]
    assert subject.bars and bars.unused(names, "sm_90", subject.bars, subject.spills) == []


@compiles
def test_calls_that_launch_nothing_are_refused():
    with pytest.raises(ValueError, match="launch no kernel"):
        report.choose(Subject([Call("idle", lambda: None)]), ["sm_90"], quick=False)
