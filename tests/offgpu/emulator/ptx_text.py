"""PTX snippets as whole kernels, for the tests of single instructions."""

import random
import struct

import numpy as np
import torch

from heiretsu.offgpu.emulator import Report, execute

LANES = 128

HEADER = """.version 8.0
.target sm_80
.address_size 64
"""

ELEMENTWISE = """
.visible .entry k(.param .u64 in, .param .u64 out)
.reqntid 128
{{
  .reg .b32 %a, %b, %c, %d, %t; .reg .b64 %x, %y, %z, %w<4>; .reg .b16 %h<4>; .reg .pred %p<4>;
  .reg .f64 %f<4>;
  ld.param.b64 %x, [in]; ld.param.b64 %y, [out];
  mov.u32 %t, %tid.x;
  mul.wide.u32 %z, %t, 12; add.s64 %x, %x, %z;
  mul.wide.u32 %z, %t, 4; add.s64 %y, %y, %z;
  ld.global.b32 %a, [%x]; ld.global.b32 %b, [%x+4]; ld.global.b32 %c, [%x+8];
  mov.b32 %d, 0;
  {body}
  st.global.b32 [%y], %d;
  ret;
}}"""

SHARED = """
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 in, .param .u64 out)
.reqntid {threads}
{{
  .reg .b32 %t, %s, %u, %v, %w, %r<24>; .reg .b64 %x, %y, %z; .reg .pred %p<4>;
  ld.param.b64 %x, [in]; ld.param.b64 %y, [out];
  mov.u32 %t, %tid.x; mov.b32 %s, smem;
  {body}
  ret;
}}"""


def elementwise(body: str, inputs: np.ndarray) -> list[int]:
    """Run a snippet that makes %d of %a, %b, %c (32 bits each) on (128, 3) words; returns the 128 results."""
    words = torch.from_numpy(inputs.astype(np.uint32).view(np.int32).copy())
    out = torch.zeros(LANES, dtype=torch.int32)
    report = execute(HEADER + ELEMENTWISE.format(body=body), (1,), [words, out])
    assert not report, str(report)
    return out.numpy().view(np.uint32).tolist()


def with_shared(body: str, source, out, threads=LANES, shared=4096, grid=(1,), **options) -> Report:
    """Run a snippet with shared memory at %s, the thread in %t, and the two tensors at %x and %y."""
    text = HEADER + SHARED.format(body=body, threads=threads)
    return execute(text, grid, [source, out], shared=shared, num_warps=threads // 32, **options)


EDGES = [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x3F800000, 255, 0x10000]


def random_words(seed=0) -> np.ndarray:
    rng = random.Random(seed)
    words = [[rng.choice(EDGES) if rng.random() < 0.3 else rng.getrandbits(32) for _ in range(3)] for _ in range(LANES)]
    return np.array(words, np.uint64)


def random_floats(low=-40.0, high=40.0, seed=0) -> np.ndarray:
    rng = random.Random(seed)
    return np.array([[float_bits(rng.uniform(low, high)) for _ in range(3)] for _ in range(LANES)], np.uint64)


def float_bits(x: float) -> int:
    return struct.unpack("<I", struct.pack("<f", x))[0]


def bits_float(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", int(word)))[0]


def signed(word: int) -> int:
    word = int(word) & 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
