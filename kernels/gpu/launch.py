"""Where a Triton kernel may run, and with which block sizes, warps and stages.

One table per architecture class holds every shipped launch configuration; the compile audit reads the same table. The
figures beside an entry are the reason for it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)  # @triton.jit reads it once too, at decoration
if INTERPRETED:  # whoever imports a kernel gets it right: without this, bfloat16 trains on garbage
    from heiretsu.kernels.gpu import interpreter_bfloat16, interpreter_launches

    interpreter_bfloat16.install()
    interpreter_launches.install()

# {architecture class: {kernel: {largest size: parameters}}}. "size" is the dim that decides the tile (head dim,
# hidden size, ...); a kernel with one configuration uses the key None. A name ending in "/fp32" is used for operands of
# four bytes and more, one ending in "/dropout" for others where a mask is drawn, each where it exists. Each kernel file
# names its own entries in its header.
TABLE: dict[str, dict[str, dict]] = {"ampere": {}, "hopper": {}, "blackwell": {}, "cdna3": {}, "interpreter": {}}


def _tiles(block_m, block_n, num_warps, num_stages, **more):
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages, **more)


# Attention, by head dim. Behind an entry: the bound that the other pipes set to the tensor cores (less what is computed
# twice), registers / spilled bytes / programs on an SM, all at bf16, causal; and what a neighbour would give. On H100
# every dot has N >= 64, which wgmma needs for its full rate; on A100 and MI300X registers decide.
TABLE["ampere"] |= {
    "attention_forward": {
        64: _tiles(128, 64, 4, 2),  # 1.00, 255/0/2; 8 warps .80: each reads all of k and v from shared memory
        128: _tiles(128, 64, 8, 2),  # .80, 245/0/1; 4 warps 1.00, but 264 bytes spilled
        256: _tiles(64, 64, 8, 2),  # .52, 255/0/1
    },
    "attention_dkdv": {
        64: _tiles(64, 128, 8, 2, DV_FIRST=True),  # .76, 252/0/1; 4 warps 504 bytes spilled
        128: _tiles(32, 128, 8, 2, DV_FIRST=True),  # .72, 255/0/1; ds first 3624 bytes; 64 x 64 .83, but 104 bytes
        256: _tiles(32, 64, 8, 2, DV_FIRST=False),  # .35, 250/0/1; 64 x 64 .56, but 64 bytes spilled
    },
    "attention_dq": {
        64: _tiles(128, 64, 8, 3),  # .80, 187/0/1; 4 warps 1.00, but 112 bytes spilled
        128: _tiles(128, 64, 8, 3),  # .80, 255/0/1
        256: _tiles(64, 64, 8, 1),  # .50, 248/0/1
    },
}
TABLE["hopper"] |= {
    "attention_forward": {
        64: _tiles(128, 64, 4, 2),  # .94, 213/0/2, bound by exp2
        128: _tiles(128, 128, 8, 2),  # 1.00, 223/0/1; 128 x 64 with 4 warps spills 104 bytes
        256: _tiles(128, 64, 8, 2),  # 1.00, 246/0/1
    },
    "attention_dkdv": {
        64: _tiles(128, 128, 8, 2, DV_FIRST=False),  # .99, 254/0/1; 3 stages 88 bytes in groups; 64 x 128 .88
        128: _tiles(64, 128, 8, 2, DV_FIRST=False),  # .99, 252/0/1
        256: _tiles(64, 64, 8, 2, DV_FIRST=False),  # .40, 255/248/1; 32 x 64 spills 48 bytes at .22
    },
    "attention_dq": {
        64: _tiles(128, 64, 8, 3),  # 1.00, 128/0/2
        128: _tiles(128, 64, 8, 3),  # 1.00, 196/0/1
        256: _tiles(128, 32, 8, 1),  # .60, 255/32/1
    },
}
TABLE["blackwell"] |= {
    "attention_forward": {
        64: _tiles(128, 64, 4, 2),  # .49, 216/0/2, bound by exp2
        128: _tiles(128, 128, 8, 2),  # .79, 228/0/1
        256: _tiles(128, 64, 8, 2),  # .66, 252/0/1
    },
    "attention_dkdv": {
        64: _tiles(64, 128, 8, 2, DV_FIRST=True),  # .44, 172/0/1, 215 with ds first; 128 x 128 .50, but 312 bytes
        128: _tiles(64, 128, 8, 2, DV_FIRST=True),  # .57, 201/0/1, 243 with ds first
        256: _tiles(64, 64, 8, 1, DV_FIRST=False),  # .50, 232/0/1
    },
    "attention_dq": {
        64: _tiles(128, 64, 8, 2),  # .67, 127/0/2
        128: _tiles(128, 64, 8, 2),  # .67, 157/0/1; 128 x 128 .86, but 24 bytes spilled
        256: _tiles(128, 32, 8, 1),  # .46, 209/0/1
    },
}
TABLE["cdna3"] |= {
    "attention_forward": {
        64: _tiles(128, 64, 4, 1),  # .59, 204/0/2
        128: _tiles(128, 32, 4, 1),  # 1.00, 203/0/2; 128 x 64 takes 303 registers
        256: _tiles(128, 16, 4, 1),  # 1.00, 305/0/1, all 64 KB of LDS
    },
    "attention_dkdv": {
        64: _tiles(32, 128, 4, 1, DV_FIRST=False),  # .72, 248/0/2; 64 keys compute S twice
        128: _tiles(32, 128, 4, 1, DV_FIRST=False),  # 1.00, 360/0/1
        256: _tiles(16, 64, 4, 1, DV_FIRST=False),  # .87, 306/0/1; 128 queries spill 481 registers
    },
    "attention_dq": {
        64: _tiles(128, 32, 4, 1),  # .93, 166/0/3; 64 queries compute S twice
        128: _tiles(128, 16, 4, 1),  # 1.00, 208/0/2; 64 queries compute S twice
        256: _tiles(64, 16, 4, 1),  # .84, 240/0/2
    },
}
# With dropout: Philox takes 46 instructions an element, which set the bound whatever the tile is, and their temporaries
# take registers, hence fewer elements a thread. A kernel that is not here spills nothing with its tiles above.
TABLE["ampere"] |= {
    "attention_forward/dropout": {
        64: _tiles(64, 64, 4, 2),  # .18, 190/0/2; 128 x 64 spills 40 bytes
        128: _tiles(128, 32, 8, 2),  # .33, 226/0/1; 128 x 64 spills 8 bytes
        256: _tiles(64, 64, 8, 2),  # .52, 255/0/1
    },
    "attention_dkdv/dropout": {
        64: _tiles(32, 128, 8, 2, DV_FIRST=True),  # .37, 190/0/1; 64 x 128 takes 255 registers
        128: _tiles(16, 128, 8, 2, DV_FIRST=True),  # .61, 243/0/1; 32 x 128 .72, but 72 bytes spilled
        256: _tiles(32, 64, 8, 2, DV_FIRST=False),  # .35, 255/0/1
    },
}
TABLE["hopper"] |= {
    "attention_forward/dropout": {
        64: _tiles(64, 64, 4, 2),  # .10, 148/0/3; 128 x 64 with 4 warps spills 40 bytes
        128: _tiles(128, 64, 8, 2),  # .19, 179/0/1; 128 x 128 spills 72 bytes
        256: _tiles(128, 64, 8, 2),  # .38, 255/0/1
    },
    "attention_dkdv/dropout": {
        64: _tiles(32, 128, 8, 2, DV_FIRST=False),  # .21, 172/0/1; 64 x 128 spills 8 bytes, 128 x 128 160
        128: _tiles(32, 128, 8, 2, DV_FIRST=False),  # .42, 246/0/1; 64 x 128 spills 32 bytes, in groups 272
        256: _tiles(32, 64, 8, 2, DV_FIRST=False),  # .22, 255/176/1; 64 x 64 .40, but 408 bytes
    },
    "attention_dq/dropout": {
        64: _tiles(128, 64, 8, 3),  # .15, 179/0/1
        128: _tiles(128, 64, 8, 2),  # .29, 250/0/1; 3 stages 8 bytes
        256: _tiles(128, 32, 8, 1),  # .55, 255/128/1
    },
}
TABLE["blackwell"] |= {
    "attention_forward/dropout": {
        64: _tiles(64, 32, 4, 2),  # .04, 221/0/2; 128 x 64 with 8 warps 312 bytes, with 4 2464
        128: _tiles(128, 32, 8, 2),  # .09, 234/0/1; 128 x 64 520 bytes, 128 x 128 2376
        256: _tiles(64, 32, 8, 2),  # .17, 214/0/1; 128 x 64 1032 bytes
    },
    "attention_dkdv/dropout": {
        64: _tiles(64, 128, 8, 2, DV_FIRST=True),  # .10, 255/0/1
        128: _tiles(32, 128, 8, 2, DV_FIRST=True),  # .19, 182/0/1; 64 x 128 24 bytes
        256: _tiles(32, 64, 8, 1, DV_FIRST=False),  # .29, 205/0/1; 64 x 64 .37, but 176 bytes
    },
}
TABLE["cdna3"] |= {
    "attention_forward/dropout": {
        64: _tiles(128, 32, 4, 1),  # .10, 180/0/2; 128 x 64 takes 301 registers
        128: _tiles(128, 32, 4, 1),  # .20, 252/0/2
        256: _tiles(128, 16, 4, 1),  # .35, 323/0/1
    },
    "attention_dkdv/dropout": {
        64: _tiles(16, 128, 4, 1, DV_FIRST=False),  # .21, 218/0/2; 32 x 128 takes 292 registers
        128: _tiles(32, 128, 4, 1, DV_FIRST=False),  # .38, 400/0/1
        256: _tiles(16, 64, 4, 1, DV_FIRST=False),  # .75, 309/0/1
    },
}
# float32 dots are made of FMAs: small tiles, so that neither registers nor the unrolled code explode. No spills but 32
# bytes in B200's forward at D = 256, 108 to 255 registers; at D = 128 on MI300X 32 x 32 would spill 550 in dkdv.
for _arch in ("ampere", "hopper", "blackwell", "cdna3"):
    _dims = (64, 256) if _arch == "cdna3" else (64, 128, 256)
    _backward = {64: _tiles(32, 32, 4, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(16, 16, 4, 1)}
    _dq = _tiles(16, 32, 8, 1) if _arch in ("hopper", "blackwell") else _backward[128]  # 32 x 32: 40 and 104 bytes
    TABLE[_arch] |= {
        "attention_forward/fp32": {64: _tiles(64, 32, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(16, 16, 4, 1)},
        "attention_dkdv/fp32": {D: _backward[D] | {"DV_FIRST": True} for D in _dims},
        "attention_dq/fp32": {D: _dq if D == 128 else _backward[D] for D in _dims},
        "attention_delta": {
            64: dict(BLOCK_M=64, num_warps=4, num_stages=1),
            256: dict(BLOCK_M=16, num_warps=4, num_stages=1),
        },
    }
# Unequal blocks, so that a confusion of M and N shows; small, so that short tests have several.
TABLE["interpreter"] |= {
    "attention_forward": {None: _tiles(64, 32, 4, 1)},
    "attention_delta": {None: dict(BLOCK_M=64, num_warps=4, num_stages=1)},
    "attention_dkdv": {None: _tiles(32, 64, 4, 1, DV_FIRST=True)},
    "attention_dq": {None: _tiles(64, 32, 4, 1)},
}

# Mixture of experts. 128x256 with 8 warps is bound by the tensor cores on A100, H100 and MI300X (1.00) and by shared
# memory on B200 (.67); 128x128 stops at .8 on H100, 256x128 at .89. Nothing spills; A100 and H100 use 166 to 255
# registers. Shared KB: A100 80 to 96, H100 and B200 144, MI300X 24 to 32. Sizes or strides that are no multiple of 16
# make scalar loads, under which such a tile spills up to 4.8 KB a thread: they have a smaller one, which does not (50
# to 166 registers), nor does float32's (58 to 128).
for _arch in ("ampere", "hopper", "blackwell", "cdna3"):
    _depth, _stages = (32, 2) if _arch == "cdna3" else (64, 3)
    TABLE[_arch] |= {
        "route": {
            16: dict(BLOCK_N=128, num_warps=4, num_stages=1),
            64: dict(BLOCK_N=32, num_warps=4, num_stages=1),
            256: dict(BLOCK_N=8, num_warps=4, num_stages=1),
            2048: dict(BLOCK_N=1, num_warps=4, num_stages=1),
        },
        "routing_plan": {
            16: dict(BLOCK=256, num_warps=4, num_stages=1),
            64: dict(BLOCK=128, num_warps=4, num_stages=1),
            256: dict(BLOCK=32, num_warps=4, num_stages=1),
            2048: dict(BLOCK=8, num_warps=4, num_stages=1),
        },
        "grouped_gemm": {
            None: dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=_depth, GROUP_M=8, num_warps=8, num_stages=_stages)
        },
        "grouped_gemm_odd": {None: dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=32, GROUP_M=8, num_warps=8, num_stages=2)},
        "grouped_gemm/fp32": {None: dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16, GROUP_M=8, num_warps=4, num_stages=2)},
        "grouped_gemm_dw": {None: dict(BLOCK_A=128, BLOCK_B=256, BLOCK_R=_depth, num_warps=8, num_stages=_stages)},
        "grouped_gemm_dw_odd": {None: dict(BLOCK_A=64, BLOCK_B=128, BLOCK_R=32, num_warps=8, num_stages=2)},
        "grouped_gemm_dw/fp32": {None: dict(BLOCK_A=64, BLOCK_B=64, BLOCK_R=16, num_warps=4, num_stages=2)},
        "moe_combine": {None: dict(BLOCK_N=16, BLOCK_C=256, num_warps=4, num_stages=1)},
        "moe_combine_backward": {None: dict(BLOCK_M=16, BLOCK_C=256, num_warps=4, num_stages=1)},
        "moe_sum_tiles": {None: dict(BLOCK_T=16, BLOCK_C=64, num_warps=4, num_stages=1)},
    }
TABLE["interpreter"] |= {
    "route": {None: dict(BLOCK_N=32, num_warps=4, num_stages=1)},
    "routing_plan": {None: dict(BLOCK=64, num_warps=4, num_stages=1)},
    "grouped_gemm": {None: dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, GROUP_M=2, num_warps=4, num_stages=1)},
    "grouped_gemm_odd": {None: dict(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, GROUP_M=2, num_warps=4, num_stages=1)},
    "grouped_gemm_dw": {None: dict(BLOCK_A=16, BLOCK_B=32, BLOCK_R=32, num_warps=4, num_stages=1)},
    "grouped_gemm_dw_odd": {None: dict(BLOCK_A=16, BLOCK_B=32, BLOCK_R=32, num_warps=4, num_stages=1)},
    "moe_combine": {None: dict(BLOCK_N=16, BLOCK_C=32, num_warps=4, num_stages=1)},
    "moe_combine_backward": {None: dict(BLOCK_M=16, BLOCK_C=32, num_warps=4, num_stages=1)},
    "moe_sum_tiles": {None: dict(BLOCK_T=2, BLOCK_C=32, num_warps=4, num_stages=1)},
}

# bias_gelu. Headroom over DRAM at bf16, forward / backward: A100 2.23 / 1.98, H100 2.26 / 2.36, B200 1.18 / 1.39,
# MI300X 1.11 / 1.50; 40 / 72 registers on H100. Twice the backward's tile costs 136 registers and gains nothing.
for _arch in ("ampere", "hopper", "blackwell", "cdna3"):
    TABLE[_arch] |= {
        "bias_gelu_forward": {None: dict(BLOCK_N=8, BLOCK_F=512, num_warps=4, num_stages=1)},
        "bias_gelu_backward": {None: dict(ROWS=64, BLOCK_N=4, BLOCK_F=512, num_warps=4, num_stages=1)},
    }
TABLE["interpreter"] |= {
    "bias_gelu_forward": {None: dict(BLOCK_N=8, BLOCK_F=32, num_warps=4, num_stages=1)},
    "bias_gelu_backward": {None: dict(ROWS=16, BLOCK_N=8, BLOCK_F=32, num_warps=4, num_stages=1)},
}

# layer_norm, by C: a program holds BLOCK_N whole rows of next_power_of_2(C) values in registers. Headroom at C = 768,
# forward / backward: A100 3.95 / 2.48, H100 3.55 / 2.43, B200 1.86 / 1.28, MI300X 2.50 / 1.96; 48 / 64 registers on
# H100, 126 at most at C = 8192, no spills.
for _arch in ("ampere", "hopper", "blackwell", "cdna3"):
    TABLE[_arch] |= {
        "layer_norm_forward": {
            512: dict(BLOCK_N=4, num_warps=4, num_stages=1),
            1024: dict(BLOCK_N=2, num_warps=4, num_stages=1),
            2048: dict(BLOCK_N=1, num_warps=4, num_stages=1),
            4096: dict(BLOCK_N=1, num_warps=8, num_stages=1),
            16384: dict(BLOCK_N=1, num_warps=16, num_stages=1),
        },
        "layer_norm_backward": {
            512: dict(ROWS=32, BLOCK_N=2, num_warps=4, num_stages=1),
            1024: dict(ROWS=16, BLOCK_N=1, num_warps=4, num_stages=1),
            2048: dict(ROWS=16, BLOCK_N=1, num_warps=8, num_stages=1),
            16384: dict(ROWS=16, BLOCK_N=1, num_warps=16, num_stages=1),
        },
    }
TABLE["interpreter"] |= {
    "layer_norm_forward": {16384: dict(BLOCK_N=4, num_warps=4, num_stages=1)},
    "layer_norm_backward": {16384: dict(ROWS=8, BLOCK_N=4, num_warps=4, num_stages=1)},
}

# dropout. Bound by Philox's integer arithmetic, whatever the tile: headroom A100 .34, H100 .32, B200 .16, MI300X .36.
for _arch in ("ampere", "hopper", "blackwell", "cdna3"):
    TABLE[_arch] |= {"dropout": {None: dict(BLOCK_N=4, BLOCK_C=256, num_warps=4, num_stages=1)}}
TABLE["interpreter"] |= {"dropout": {None: dict(BLOCK_N=8, BLOCK_C=32, num_warps=4, num_stages=1)}}

# linear_cross_entropy, at bf16, C = 768. Bound on tensor-core use (bytes spilled by a thread, all behind the hot loop):
# lse, dlogits, dx, dweight. A100 1.0 (24), 1.0 (16), 1.0 (64), 1.0; H100 1.0, 1.0 (8), 1.0, 1.0; B200 .50, .50,
# .67 (264), .67 (160); MI300X 1.0 each. 128 x 256 tiles, for 128 x 128 are held back by shared memory on H100 (.80); on
# B200 the two kernels with a long epilogue spill 288 and 104 bytes at 256. float32 has no tensor cores without TF32.
_BUFFER = dict(
    BUFFER_ELEMENTS=1 << 26
)  # dlogits of a block of the vocabulary: 128 MiB in bf16, 8192 words of 8192 tokens
for _arch, _lse, _dlogits, _gemm in (
    ("ampere", (256, 8, 3), (256, 8, 3), (256, 64, 3)),
    ("hopper", (256, 8, 3), (256, 8, 3), (256, 64, 3)),
    ("blackwell", (128, 4, 3), (128, 8, 3), (256, 64, 3)),
    ("cdna3", (128, 8, 2), (128, 8, 2), (128, 64, 2)),
):
    _keys = ("BLOCK_V", "num_warps", "num_stages")
    _small = dict(BLOCK_N=64, BLOCK_V=64, BLOCK_C=16, num_warps=4, num_stages=2)
    TABLE[_arch] |= {
        "linear_cross_entropy_lse": {
            None: dict(SPLIT_V=2048, BLOCK_N=128, BLOCK_C=64) | dict(zip(_keys, _lse, strict=True))
        },
        "linear_cross_entropy_lse/fp32": {None: dict(SPLIT_V=2048) | _small},
        "linear_cross_entropy_combine": {None: dict(BLOCK_N=128, num_warps=4, num_stages=1)},
        "linear_cross_entropy_dlogits": {
            None: _BUFFER | dict(BLOCK_N=128, BLOCK_C=64) | dict(zip(_keys, _dlogits, strict=True))
        },
        "linear_cross_entropy_dlogits/fp32": {None: _BUFFER | _small},
        "linear_cross_entropy_gemm": {
            None: dict(BLOCK_M=128, num_warps=8) | dict(zip(("BLOCK_C", "BLOCK_K", "num_stages"), _gemm, strict=True))
        },
        "linear_cross_entropy_gemm/fp32": {None: dict(BLOCK_M=64, BLOCK_C=64, BLOCK_K=16, num_warps=4, num_stages=2)},
    }
TABLE["interpreter"] |= {
    "linear_cross_entropy_lse": {None: dict(SPLIT_V=64, BLOCK_N=32, BLOCK_V=32, BLOCK_C=16, num_warps=4, num_stages=1)},
    "linear_cross_entropy_combine": {None: dict(BLOCK_N=32, num_warps=4, num_stages=1)},
    "linear_cross_entropy_dlogits": {
        None: dict(BUFFER_ELEMENTS=4096, BLOCK_N=32, BLOCK_V=64, BLOCK_C=16, num_warps=4, num_stages=1)
    },
    "linear_cross_entropy_gemm": {None: dict(BLOCK_M=32, BLOCK_C=64, BLOCK_K=16, num_warps=4, num_stages=1)},
}


@dataclasses.dataclass(frozen=True)
class AuditCase:
    """One shipped launch of one kernel, as the compile audit takes it: compiled ahead of time, never run.

    A kernel file's audit_cases(arch) lists its own for one architecture class (a key of TABLE, as `lookup` takes it).
    signature: Triton type of each run-time argument ("*bf16:16", "i32"; ":16" says divisible by 16). constexprs: the
    rest, strides of 1 included. The bars: max_spill_bytes a thread; min_bound, the least share of the tensor cores'
    (or, without a dot, of the memory's) peak that the hot loop's other pipes leave possible; loop_flops, what one
    iteration of the hot loop computes by closed form, which shows that the audit read the right loop. quick: whether a
    quick audit takes it, too.
    """

    name: str
    fn: object  # the @triton.jit function
    signature: dict[str, str]
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int
    max_spill_bytes: int = 0
    min_bound: float = 0.0
    loop_flops: int | None = None
    quick: bool = True


class Entry(NamedTuple):
    """Which entry of the table: `TABLE[arch][row][size]`."""

    arch: str
    row: str  # a kernel's name, or that and "/fp32" or "/dropout"
    size: int | None


# What autotune.py chose over the table's entries. This and the two below are the process's and not the context's:
# autograd runs a GPU's backward in threads of its own, into which no contextvars.Context goes.
CHOSEN: dict[Entry, dict] = {}
_overrides: list[dict] = []  # innermost last
_observers: list[dict[Entry, None]] = []


@contextlib.contextmanager
def override(**parameters):
    """Inside, every launch uses these parameters over the table's (num_stages=1, num_warps=8, ...), on every thread.

    A kernel takes those of them that its entry in the table names. What autotune.py chose gives way, too.
    """
    _overrides.append(parameters)
    try:
        yield
    finally:
        _overrides.pop()


@contextlib.contextmanager
def observed() -> Iterator[dict[Entry, None]]:
    """Inside, the yielded dict collects the entries that launches use, in the order of their first use."""
    entries: dict[Entry, None] = {}
    _observers.append(entries)
    try:
        yield entries
    finally:
        _observers.pop()


def _emulated_target():
    """Target of an emulating driver, which takes CPU tensors; None under a real driver or none."""
    try:
        driver = triton.runtime.driver.active
        return driver.get_current_target() if getattr(driver, "accepts_cpu_tensors", False) else None
    except RuntimeError:  # "0 active drivers": no GPU here
        return None


def architecture(device: torch.device) -> str:
    """Architecture class of a device: a key of TABLE."""
    if INTERPRETED:
        return "interpreter"
    if device.type == "cuda" and torch.version.hip:
        return "cdna3"
    target = _emulated_target() if device.type == "cpu" else None
    major = target.arch // 10 if target else torch.cuda.get_device_capability(device)[0]
    return "ampere" if major <= 8 else "hopper" if major == 9 else "blackwell"


def require_device(op: str, tensor) -> None:
    """Raise ValueError unless the Triton form of `op` can run where the tensor is."""
    device = tensor.device
    if device.type == "cuda" or (device.type == "cpu" and (INTERPRETED or _emulated_target())):
        return
    raise ValueError(
        f"{op}: the Triton kernel was given {device.type} tensors; move them to a GPU, set TRITON_INTERPRET=1 before "
        f"the import, or call heiretsu.kernels.fused.{op}, which has a CPU form"
    )


def on(device: torch.device):
    """Context in which Triton launches on `device`, which need not be the process's current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def parameters(kernel: str, device: torch.device, size=None, itemsize: int = 2, dropout: bool = False) -> dict:
    """Launch parameters of `kernel` (block sizes, num_warps, num_stages): a fresh dict of keyword arguments.

    The table's, or what autotune.py chose over them, under what `override` says.
    size: picks the smallest key of the kernel's entry that is >= size. itemsize: bytes of an operand element.
    dropout: whether the kernel draws a dropout mask.
    """
    entry = find(kernel, architecture(device), size, itemsize, dropout)
    for entries in _observers:
        entries[entry] = None
    values = dict(CHOSEN.get(entry) or TABLE[entry.arch][entry.row][entry.size])
    for overridden in _overrides:
        values |= {name: value for name, value in overridden.items() if name in values}
    return values


def find(kernel: str, arch: str, size=None, itemsize: int = 2, dropout: bool = False) -> Entry:
    """The table's entry for a launch. Raises ValueError for a size beyond the kernel's largest."""
    special = f"{kernel}/fp32" if itemsize >= 4 else f"{kernel}/dropout" if dropout else kernel
    row = special if special in TABLE[arch] else kernel
    sizes = TABLE[arch][row]
    if size is None or None in sizes:
        return Entry(arch, row, None)
    fits = [key for key in sizes if key >= size]
    if not fits:
        raise ValueError(f"{kernel}: size {size} is larger than {max(sizes)}, the largest that the kernel takes")
    return Entry(arch, row, min(fits))


def lookup(kernel: str, arch: str, size=None, itemsize: int = 2, dropout: bool = False) -> dict:
    """The table's own parameters, whatever was chosen or overridden (for the audit)."""
    entry = find(kernel, arch, size, itemsize, dropout)
    return dict(TABLE[entry.arch][entry.row][entry.size])
