"""Each instruction against its definition in the PTX ISA manual, written in plain Python integers and floats."""

import math

import numpy as np
import pytest
import torch

from heiretsu.offgpu.emulator import Unsupported, unsupported
from tests.offgpu.emulator.ptx_text import (
    ELEMENTWISE,
    HEADER,
    LANES,
    bits_float,
    elementwise,
    float_bits,
    random_floats,
    random_words,
    signed,
)

MASK = 0xFFFFFFFF


def truncated(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def extract(a, b, c, is_signed):
    position, length, result = b & 255, min(c & 255, 32), 0
    if not length:
        return 0
    sign = a >> min(position + length - 1, 31) & 1 if is_signed else 0
    for i in range(32):
        inside = i < length and position + i < 32
        result |= (a >> position + i & 1 if inside else sign) << i
    return result


def permute(a, b, selector):
    source, result = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return result


def insert(a, b, position, length):
    mask = ((1 << length) - 1) << position
    return (b & ~mask) | (a << position & mask)


def table(a, b, c, lut):
    return sum((lut >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))


INTEGER = {
    "add.s32 %d,%a,%b;": lambda a, b, c: a + b,
    "sub.s32 %d,%a,%b;": lambda a, b, c: a - b,
    "mul.lo.s32 %d,%a,%b;": lambda a, b, c: a * b,
    "mul.hi.u32 %d,%a,%b;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %d,%a,%b;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %d,%a,%b,%c;": lambda a, b, c: a * b + c,
    "mul.wide.s32 %z,%a,%b; shr.u64 %z,%z,20; cvt.u32.u64 %d,%z;": lambda a, b, c: signed(a) * signed(b) >> 20,
    "mul.wide.u32 %z,%a,%b; mul.hi.u64 %z,%z,%z; cvt.u32.u64 %d,%z;": lambda a, b, c: (a * b) ** 2 >> 64,
    "mul.wide.s32 %z,%a,%b; mul.hi.s64 %z,%z,%z; cvt.u32.u64 %d,%z;": lambda a, b, c: (
        (signed(a) * signed(b)) ** 2 >> 64
    ),
    "shl.b32 %d,%a,%b;": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32 %d,%a,%b;": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32 %d,%a,%b;": lambda a, b, c: signed(a) >> min(b, 31),
    "bfe.u32 %d,%a,%b,%c;": lambda a, b, c: extract(a, b, c, False),
    "bfe.s32 %d,%a,%b,%c;": lambda a, b, c: extract(a, b, c, True),
    "bfi.b32 %d,%a,%b,4,9;": lambda a, b, c: insert(a, b, 4, 9),
    "prmt.b32 %d,%a,%b,%c;": permute,
    "lop3.b32 %d,%a,%b,%c,0xE8;": lambda a, b, c: (a & b) | (a & c) | (b & c),
    "lop3.b32 %d,%a,%b,%c,0x96;": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 %d,%a,%b,%c,0x2a;": lambda a, b, c: table(a, b, c, 0x2A),
    "shf.l.wrap.b32 %d,%a,%b,%c;": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.wrap.b32 %d,%a,%b,%c;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.r.clamp.b32 %d,%a,%b,%c;": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "popc.b32 %d,%a;": lambda a, b, c: bin(a).count("1"),
    "clz.b32 %d,%a;": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %d,%a;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "min.s32 %d,%a,%b;": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32 %d,%a,%b;": lambda a, b, c: max(a, b),
    "abs.s32 %d,%a;": lambda a, b, c: abs(signed(a)),
    "neg.s32 %d,%a;": lambda a, b, c: -a,
    "not.b32 %d,%a;": lambda a, b, c: ~a,
    "and.b32 %d,%a,%b; xor.b32 %d,%d,%c;": lambda a, b, c: (a & b) ^ c,
    "or.b32 %b,%b,1; div.u32 %d,%a,%b;": lambda a, b, c: a // (b | 1),
    "or.b32 %b,%b,5; rem.u32 %d,%a,%b;": lambda a, b, c: a % (b | 5),
    "or.b32 %b,%b,5; div.s32 %d,%a,%b;": lambda a, b, c: truncated(signed(a), signed(b | 5)),
    "or.b32 %b,%b,5; rem.s32 %d,%a,%b;": lambda a, b, c: (
        signed(a) - truncated(signed(a), signed(b | 5)) * signed(b | 5)
    ),
    "setp.lt.s32 %p1,%a,%b; selp.b32 %d,%a,%c,%p1;": lambda a, b, c: a if signed(a) < signed(b) else c,
    "setp.ls.u32 %p1,%a,%b; selp.b32 %d,1,0,%p1;": lambda a, b, c: a <= b,
    "setp.gt.and.s32 %p1,%a,%b,1; @!%p1 mov.b32 %d,7;": lambda a, b, c: 0 if signed(a) > signed(b) else 7,
    "setp.eq.u32 %p1|%p2,%a,%b; selp.b32 %d,3,5,%p2;": lambda a, b, c: 3 if a != b else 5,
    "slct.b32.s32 %d,%a,%b,%c;": lambda a, b, c: a if signed(c) >= 0 else b,
    "cvt.s32.s8 %d,%a;": lambda a, b, c: (a & 255) - (256 if a & 128 else 0),
    "cvt.u32.u16 %d,%a;": lambda a, b, c: a & 65535,
    "mov.b32 {%h1,%h2},%a; mov.b32 %d,{%h2,%h1};": lambda a, b, c: (a >> 16) | (a & 65535) << 16,
    "mov.b64 %z,{%a,%b}; shr.u64 %z,%z,8; cvt.u32.u64 %d,%z;": lambda a, b, c: (b << 32 | a) >> 8,
    "{ .reg .b32 %a; mov.b32 %a, %b; add.s32 %d, %a, 1; }": lambda a, b, c: b + 1,
}


@pytest.mark.parametrize("body", INTEGER)
def test_integer(body):
    words = random_words()
    assert elementwise(body, words) == [INTEGER[body](*map(int, row)) & MASK for row in words]


@pytest.mark.parametrize(
    ("body", "source"),
    [
        ("shfl.sync.bfly.b32 %d,%a,5,31,-1;", lambda i: i ^ 5),
        ("shfl.sync.up.b32 %d,%a,3,0,-1;", lambda i: i - 3 if i % 32 >= 3 else i),
        ("shfl.sync.down.b32 %d,%a,3,31,-1;", lambda i: i + 3 if i % 32 < 29 else i),
        ("shfl.sync.idx.b32 %d,%a,7,31,-1;", lambda i: i // 32 * 32 + 7),
        ("shfl.sync.bfly.b32 %d,%a,1,0x1c1f,-1;", lambda i: i ^ 1),  # segments of four lanes
        ("shfl.sync.down.b32 %d,%a,1,0x1c03,-1;", lambda i: i + 1 if i % 4 < 3 else i),
    ],
)
def test_shuffle(body, source):
    words = random_words()
    assert elementwise(body, words) == [int(words[source(i), 0]) for i in range(LANES)]


def test_votes_and_warp_reductions():
    words = random_words()
    warps = [[int(a) for a in words[w : w + 32, 0]] for w in range(0, LANES, 32)]
    odd = "and.b32 %t,%a,1; setp.ne.u32 %p1,%t,0; "

    def by_warp(function):
        return [function(warp) & MASK for warp in warps for _ in range(32)]

    ballot = elementwise(odd + "vote.sync.ballot.b32 %d,%p1,-1;", words)
    assert ballot == by_warp(lambda warp: sum((a & 1) << i for i, a in enumerate(warp)))
    every = elementwise("setp.lt.u32 %p1,%a,%a; vote.sync.any.pred %p2,%p1,-1; selp.b32 %d,1,0,%p2;", words)
    assert every == by_warp(lambda warp: 0)
    assert elementwise("redux.sync.add.s32 %d,%a,-1;", words) == by_warp(sum)
    assert elementwise("redux.sync.max.u32 %d,%a,-1;", words) == by_warp(max)
    assert elementwise("redux.sync.min.s32 %d,%a,-1;", words) == by_warp(lambda warp: min(map(signed, warp)))


FLOAT = {  # exactly rounded ones, then the approximate ones
    "add.f32 %d,%a,%b;": lambda a, b, c: a + b,
    "mul.f32 %d,%a,%b;": lambda a, b, c: a * b,
    "fma.rn.f32 %d,%a,%b,%c;": lambda a, b, c: a * b + c,
    "div.full.f32 %d,%a,%b;": lambda a, b, c: a / b,
    "max.f32 %d,%a,%b;": lambda a, b, c: max(a, b),
    "neg.f32 %d,%a;": lambda a, b, c: -a,
    "copysign.f32 %d,%a,%b;": lambda a, b, c: math.copysign(b, a),
    "min.xorsign.abs.f32 %d,%a,%b;": lambda a, b, c: math.copysign(min(abs(a), abs(b)), a * b),
    "abs.f32 %b,%b; sqrt.rn.f32 %d,%b;": lambda a, b, c: math.sqrt(abs(b)),
    "rcp.approx.f32 %d,%a;": lambda a, b, c: 1 / a,
    "ex2.approx.ftz.f32 %d,%a;": lambda a, b, c: 2.0**a,
    "abs.f32 %b,%b; lg2.approx.f32 %d,%b;": lambda a, b, c: math.log2(abs(b)),
    "abs.f32 %b,%b; rsqrt.approx.ftz.f32 %d,%b;": lambda a, b, c: abs(b) ** -0.5,
    "sin.approx.f32 %d,%a;": lambda a, b, c: math.sin(a),
    "tanh.approx.f32 %d,%a;": lambda a, b, c: math.tanh(a),
    "cvt.f64.f32 %f1,%a; cvt.f64.f32 %f2,%b; fma.rn.f64 %f1,%f1,%f2,%f2; cvt.rn.f32.f64 %d,%f1;": lambda a, b, c: (
        a * b + b
    ),
    "cvt.f64.f32 %f1,%a; rcp.rn.f64 %f1,%f1; cvt.rn.f32.f64 %d,%f1;": lambda a, b, c: 1 / a,
}


@pytest.mark.parametrize("body", FLOAT)
def test_float32_to_an_ulp_or_two(body):
    words = random_floats()
    for got, row in zip(elementwise(body, words), words, strict=True):
        inputs = [bits_float(word) for word in row]
        reference = FLOAT[body](*inputs)
        assert abs(bits_float(got) - reference) <= 2.4e-7 * max(abs(reference), 1e-30), inputs


def test_denormals_are_flushed_only_where_ftz_says_so():
    words = np.full((LANES, 3), 0x00000001, np.uint64)
    assert elementwise("add.f32 %d,%a,0f00000000;", words)[0] == 1
    assert elementwise("add.ftz.f32 %d,%a,0f00000000;", words)[0] == 0


def test_float_to_integer_saturates():
    words = random_floats(-3e9, 3e9)
    values = [bits_float(w) for w in words[:, 0]]
    got = elementwise("cvt.rzi.s32.f32 %d,%a;", words)
    assert got == [max(-(2**31), min(2**31 - 1, int(v))) & MASK for v in values]
    words = random_floats()
    assert elementwise("cvt.rni.s32.f32 %d,%a;", words) == [round(bits_float(w)) & MASK for w in words[:, 0]]
    nan = np.full((LANES, 3), 0x7FC00000, np.uint64)
    assert elementwise("cvt.rzi.s32.f32 %d,%a;", nan)[0] == 0


def half_bits(tensor, dtype):
    return [h & 65535 for h in tensor.to(dtype).view(torch.int16).tolist()]


def test_narrow_floats_round_to_nearest_even():
    words = random_floats()
    a, b, _ = torch.from_numpy(words.astype(np.uint32).view(np.float32).copy()).unbind(1)
    assert elementwise("cvt.rn.bf16.f32 %h1,%a; cvt.u32.u16 %d,%h1;", words) == half_bits(a, torch.bfloat16)
    for name, dtype in (("f16x2", torch.float16), ("bf16x2", torch.bfloat16)):
        pairs = [h << 16 | low for h, low in zip(half_bits(a, dtype), half_bits(b, dtype), strict=True)]
        assert elementwise(f"cvt.rn.{name}.f32 %d,%a,%b;", words) == pairs
    half_way = np.array([[0x3F808000, 0x3F818000, 0]] * LANES, np.uint64)  # between two bfloat16s: to the even one
    assert elementwise("cvt.rn.bf16x2.f32 %d,%b,%a;", half_way)[0] == 0x3F823F80


@pytest.mark.parametrize(("name", "dtype"), [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_packed_halves(name, dtype):
    words = random_words()  # NaNs among them: compared as numbers
    a, b, c = (torch.from_numpy(words[:, j].astype(np.uint32).view(np.int32).copy()).view(dtype) for j in range(3))
    for op, reference in (("add", a + b), ("mul", a * b), ("fma", (a.double() * b.double() + c.double()).to(dtype))):
        operands = "%a,%b,%c" if op == "fma" else "%a,%b"
        got = np.array(elementwise(f"{op}.rn.{name} %d,{operands};", words), np.uint32)
        torch.testing.assert_close(torch.from_numpy(got.view(np.int32)).view(dtype), reference, equal_nan=True)


def test_nan_compares_false_unless_the_unordered_form_is_asked_for():
    words = np.array([[0x7FC00000, 0x3F800000, 0]] * LANES, np.uint64)
    for how, expected in dict(lt=0, ge=0, ne=0, eq=0, neu=1, equ=1, ltu=1, num=0, nan=1).items():
        assert elementwise(f"setp.{how}.f32 %p1,%a,%b; selp.b32 %d,1,0,%p1;", words)[0] == expected, how
    assert elementwise("max.f32 %d,%a,%b;", words)[0] == float_bits(1.0)
    assert math.isnan(bits_float(elementwise("max.NaN.f32 %d,%a,%b;", words)[0]))


def test_lanes_of_a_loop_leave_it_one_by_one_and_meet_again():
    steps = "LOOP: add.s32 %d,%d,2; sub.s32 %t,%t,1; setp.ge.s32 %p1,%t,0; @%p1 bra LOOP;"
    assert elementwise(steps, random_words()) == [2 * (i + 1) for i in range(LANES)]


def test_an_unknown_opcode_or_modifier_is_named():
    with pytest.raises(Unsupported, match="vadd.u32"):
        elementwise("vadd.u32.u32.u32 %d,%a,%b,%c;", random_words())
    with pytest.raises(Unsupported, match="add.strange.s32"):
        elementwise("add.strange.s32 %d,%a,%b;", random_words())
    text = HEADER + ELEMENTWISE.format(body="vadd.u32.u32.u32 %d,%a,%b,%c; add.s32 %d,%a,%b;")
    assert unsupported(text) == ["vadd.u32.u32.u32"]
