"""The parts of the audit that need no compiler: control flow, pipe costs, occupancy, which bars hold."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from heiretsu.kernels.gpu.launch import AuditCase
from heiretsu.offgpu.audit import bars, model, report
from heiretsu.offgpu.audit.disassembly import Instruction, decode_tcgen05_shape, parse_amd
from heiretsu.offgpu.audit.loops import natural_loops
from heiretsu.offgpu.audit.pipes import access_bits, charge, mma_shape
from heiretsu.offgpu.machines import KIB, machine

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


def case(**changes):
    return AuditCase("gelu forward", None, {}, {}, num_warps=4, num_stages=1, **changes)


BAR = bars.Bar("gelu .*", "sm_90", max_spill_bytes=0, min_bound=2.2, min_wide=0.9)


def test_library_bar_holds_beside_the_cases_own():
    assert bars.failures(case(), figures(), H100, ()) == []
    assert bars.failures(case(), figures(), H100, (BAR,)) == ["DRAM headroom 2.0, at least 2.2 wanted"]
    assert bars.failures(case(), figures(bound=2.2), H100, (BAR,)) == []
    assert bars.failures(case(), figures(), machine("sm_100"), (BAR,)) == []


def test_a_case_cannot_allow_itself_more_spill_than_the_library():
    lax = case(max_spill_bytes=64)
    assert bars.failures(lax, figures(spill_bytes=8), H100, ()) == []
    assert bars.failures(lax, figures(spill_bytes=8, bound=3.0), H100, (BAR,)) == ["spills 8 bytes a thread, 0 allowed"]


def test_narrow_accesses_fall_below_a_bar():
    (text,) = bars.failures(case(), figures(bound=3.0, wide_stores=0.5), H100, (BAR,))
    assert "50% of the stored bytes" in text


def test_bar_without_a_case_is_reported():
    assert bars.unused(["gelu forward"], "sm_90", (BAR,)) == []
    assert len(bars.unused(["layer norm"], "sm_90", (BAR,))) == 1
    assert bars.unused(["layer norm"], "sm_80", (BAR,)) == []


def test_a_case_that_two_files_list_is_taken_once():
    jobs = report.choose(["tests.offgpu.audit.audit_kernels"] * 2, ["sm_90"], quick=False)
    names = [job.case_name for job in jobs]
    assert len(names) == len(set(names)) == 10


def test_one_name_for_two_cases_is_refused():
    path = str(Path(__file__).with_name("audit_kernels.py"))
    with pytest.raises(ValueError, match="other cases have the same names on sm_90: sound"):
        report.choose(["tests.offgpu.audit.audit_kernels", path], ["sm_90"], quick=False)


def test_quick_takes_every_case_on_one_machine_and_the_first_elsewhere():
    jobs = report.choose(["tests.offgpu.audit.audit_kernels"], ["sm_80", "sm_90"], quick=True)
    assert [job.arch for job in jobs].count("sm_90") == 10
    assert [job.case_name for job in jobs if job.arch == "sm_80"] == ["sound"]


def test_quick_leaves_out_what_only_the_full_audit_takes(monkeypatch):
    found = {"slow": case(quick=False), "first": case(), "second": case()}
    monkeypatch.setattr(report.runner, "cases", lambda source, arch: found)
    chosen = {quick: [(job.arch, job.case_name) for job in report.choose(["file"], ["sm_80", "sm_90"], quick)]
              for quick in (False, True)}  # fmt: skip
    assert len(chosen[False]) == 6
    assert chosen[True] == [("sm_80", "first"), ("sm_90", "first"), ("sm_90", "second")]
