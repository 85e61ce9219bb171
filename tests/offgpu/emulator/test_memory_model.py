"""What the emulator must report about memory, barriers and order, and what it must not."""

import pytest
import torch

from heiretsu.offgpu.emulator import PTXError, Report
from tests.offgpu.emulator.ptx_text import with_shared

SCHEDULES = pytest.mark.parametrize("schedule", ["lockstep", "random"])

MINE = "shl.b32 %u,%t,2; mul.wide.u32 %z,%u,1; add.s64 %x,%x,%z; add.s64 %y,%y,%z; add.u32 %u,%u,%s; "
OF_ANOTHER_WARP = "xor.b32 %v,%t,127; shl.b32 %v,%v,2; add.u32 %v,%v,%s; "


def words(n=128):
    return torch.arange(n, dtype=torch.int32)


def zeros(n=128):
    return torch.zeros(n, dtype=torch.int32)


@SCHEDULES
@pytest.mark.parametrize("barrier", ["bar.sync 0;", ""])
def test_shared_memory_needs_a_barrier_between_warps(barrier, schedule):
    body = MINE + OF_ANOTHER_WARP + f"st.shared.b32 [%u],%t; {barrier} ld.shared.b32 %w,[%v]; st.global.b32 [%y],%w;"
    out = zeros()
    report = with_shared(body, words(), out, schedule=schedule)
    if barrier:
        assert not report and torch.equal(out, words().flip(0))
    else:
        assert "race-shared" in report.kinds()


@SCHEDULES
def test_a_barrier_is_missing_before_shared_memory_is_used_again(schedule):
    body = MINE + OF_ANOTHER_WARP + "st.shared.b32 [%u],%t; bar.sync 0; ld.shared.b32 %w,[%v]; st.shared.b32 [%u],%w;"
    report = with_shared(body, words(), zeros(), schedule=schedule)
    assert report.kinds() == ["race-shared"]


@SCHEDULES
def test_lanes_of_one_warp_need_no_barrier(schedule):
    body = MINE + "xor.b32 %v,%t,31; shl.b32 %v,%v,2; add.u32 %v,%v,%s; "
    body += "st.shared.b32 [%u],%t; ld.shared.b32 %w,[%v]; st.global.b32 [%y],%w;"
    assert not with_shared(body, words(), zeros(), schedule=schedule)


@SCHEDULES
def test_warps_may_store_the_same_value_to_one_place(schedule):
    same = with_shared("st.shared.b32 [%s],7;", words(), zeros(), schedule=schedule)
    different = with_shared("st.shared.b32 [%s],%t;", words(), zeros(), schedule=schedule)
    assert not same and different.kinds() == ["race-shared"]


def test_shared_memory_read_before_it_is_written():
    assert with_shared(MINE + "ld.shared.b32 %w,[%u];", words(), zeros()).kinds() == ["uninit-shared"]


@SCHEDULES
@pytest.mark.parametrize("wait", ["cp.async.wait_group 0;", "cp.async.wait_group 1;", ""])
def test_cp_async_has_to_be_waited_for(wait, schedule):
    body = MINE + "cp.async.ca.shared.global [%u],[%x],4; cp.async.commit_group; "
    body += f"{wait} ld.shared.b32 %w,[%u]; st.global.b32 [%y],%w;"
    out = zeros()
    report = with_shared(body, words(), out, schedule=schedule)
    if wait.endswith("0;"):
        assert not report and torch.equal(out, words())
    else:
        assert report.kinds() == ["cpasync"] and (out == -1).all()  # poison


def test_cp_async_fills_with_zeros_beyond_the_source_size():
    body = MINE + "mov.b32 %w,0; setp.lt.u32 %p1,%t,5; selp.b32 %w,4,0,%p1; "
    body += "cp.async.ca.shared.global [%u],[%x],4,%w; cp.async.wait_all; ld.shared.b32 %w,[%u]; st.global.b32 [%y],%w;"
    out = zeros()
    assert not with_shared(body, words(5) + 1, out)  # lanes past the end read nothing
    assert out.tolist() == [1, 2, 3, 4, 5] + [0] * 123


def test_an_address_outside_every_tensor_stops_the_run():
    out = zeros(100)
    report = Report()
    with pytest.raises(PTXError, match="byte 400 of tensor #1"):
        with_shared(MINE + "st.global.b32 [%y],%t;", words(), out, report=report)
    assert report.kinds() == ["oob"] and report[0].count == 28


@pytest.mark.parametrize("view", [lambda x: x[64:96], lambda x: x.view(32, 4)[:, 1], lambda x: x[:126]])
def test_the_rest_of_the_storage_behind_a_view_is_out_of_bounds(view):
    report = Report()
    with pytest.raises(PTXError, match="no element"):
        with_shared(MINE + "ld.global.b32 %w,[%x];", view(words()), zeros(), report=report)
    assert report.kinds() == ["oob"] and report[0].count >= 2


def test_a_misaligned_vector_stops_the_run():
    report = Report()
    with pytest.raises(PTXError, match="misaligned global access of 16 bytes"):
        with_shared(MINE + "ld.global.v4.b32 {%r0,%r1,%r2,%r3},[%x];", words(512), zeros(), report=report)
    assert report.kinds() == ["misaligned"]


@SCHEDULES
def test_barrier_and_warp_instructions_with_lanes_missing(schedule):
    shuffle = "setp.lt.u32 %p1,%t,40; @%p1 shfl.sync.bfly.b32 %u,%t,1,31,-1;"
    assert with_shared(shuffle, words(), zeros(), schedule=schedule).kinds() == ["divergence"]
    half = "setp.lt.u32 %p1,%t,64; @%p1 bra SKIP; bar.sync 0; SKIP: bra END; END: add.u32 %u,%u,1;"
    assert with_shared(half, words(), zeros(), schedule=schedule).kinds() == ["divergence"]


@SCHEDULES
def test_two_programs_may_not_write_different_values_to_one_place(schedule):
    body = "mov.u32 %u,%ctaid.x; add.u32 %u,%u,{0}; st.global.b32 [%y],%u;"
    racing = with_shared(body.format("0"), words(), zeros(), threads=32, grid=(3,), schedule=schedule)
    assert racing.kinds() == ["race-global"] and "another CTA" in racing[0].text
    assert not with_shared("st.global.b32 [%y],5;", words(), zeros(), threads=32, grid=(3,), schedule=schedule)


@SCHEDULES
def test_a_lost_update_between_programs(schedule):
    plain = "setp.eq.u32 %p1,%t,0; @%p1 ld.global.b32 %u,[%y]; add.u32 %u,%u,1; @%p1 st.global.b32 [%y],%u;"
    atomic = "setp.eq.u32 %p1,%t,0; @%p1 red.global.add.u32 [%y],1;"
    out = zeros()
    assert with_shared(plain, words(), zeros(), grid=(4,), schedule=schedule).kinds() == ["race-global"]
    assert not with_shared(atomic, words(), out, grid=(4,), schedule=schedule) and out[0] == 4


@SCHEDULES
def test_release_and_acquire_order_two_programs(schedule):
    """Program 0 writes and sets a flag; program 1 spins on it, then reads. Relaxed, the flag orders nothing."""
    body = """mov.u32 %u,%ctaid.x; setp.ne.u32 %p1,%u,0; setp.ne.u32 %p2,%t,0; @%p2 bra END; @%p1 bra SPIN;
      st.global.b32 [%y],42; atom.global.gpu.{release}.exch.b32 %v,[%y+4],1; bra END;
      SPIN: atom.global.gpu.{acquire}.cas.b32 %v,[%y+4],1,1; setp.eq.u32 %p2,%v,0; @%p2 bra SPIN;
      ld.global.b32 %w,[%y]; st.global.b32 [%y+8],%w;
      END: add.u32 %u,%u,1;"""
    for release, acquire, kinds in (("release", "acquire", []), ("relaxed", "relaxed", ["race-global"])):
        out = zeros()
        text = body.format(release=release, acquire=acquire)
        report = with_shared(text, words(), out, threads=32, grid=(2,), schedule=schedule, batch=2, limit=100_000)
        assert report.kinds() == kinds and out[2] == 42


def test_an_endless_loop_ends_at_the_limit():
    with pytest.raises(PTXError, match="more than 1000 instructions"):
        with_shared("LOOP: add.u32 %u,%u,1; bra LOOP;", words(), zeros(), limit=1000)


def test_undeclared_schedules_are_refused():
    with pytest.raises(ValueError, match="lockstep"):
        with_shared("add.u32 %u,%u,1;", words(), zeros(), schedule="fair")


def test_the_report_counts_what_ran():
    body = "setp.eq.u32 %p1,%t,999; @%p1 bra NEVER; bra END; NEVER: add.u32 %u,%u,1; END: add.u32 %u,%u,2;"
    stats = with_shared(body, words(), zeros(), grid=(2,)).stats
    assert stats["ctas"] == 2 and 0 < stats["coverage"] < 1
