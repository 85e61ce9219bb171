"""Triton's language, compiled for sm_80 and sm_90 and emulated, against PyTorch."""

import pytest
import torch
import triton
import triton.language as tl

from heiretsu.offgpu.emulator import Unsupported, run

TARGETS = pytest.mark.parametrize("target", [80, 90])
full = pytest.mark.emulate_full


def clean(*args, **kwargs):
    report = run(*args, **kwargs)
    assert not report, str(report)


def assert_close(got, expected, tolerance):
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@triton.jit
def elementwise(X, Y, Out, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(X + offsets), tl.load(Y + offsets)
    if OP == "arithmetic":
        z = (x * y + x - y) / (y * y + 1)
    elif OP == "extrema":
        z = tl.clamp(tl.maximum(tl.minimum(x, y), 0.5 * x), -0.5, 0.5)
    elif OP == "exponentials":
        z = tl.exp2(x) + tl.log2(tl.abs(y) + 1) + tl.exp(y) + tl.log(tl.abs(x) + 1)
    elif OP == "trigonometry":
        z = tl.sin(x) * tl.cos(y) + tl.erf(x)
    elif OP == "roots":
        z = tl.sqrt(tl.abs(x)) + tl.rsqrt(tl.abs(y) + 1) + tl.sigmoid(x) + tl.floor(y) * tl.ceil(x)
    tl.store(Out + offsets, z)


ELEMENTWISE = {
    "arithmetic": lambda x, y: (x * y + x - y) / (y * y + 1),
    "extrema": lambda x, y: torch.maximum(torch.minimum(x, y), 0.5 * x).clamp(-0.5, 0.5),
    "exponentials": lambda x, y: x.exp2() + (y.abs() + 1).log2() + y.exp() + (x.abs() + 1).log(),
    "trigonometry": lambda x, y: x.sin() * y.cos() + x.erf(),
    "roots": lambda x, y: x.abs().sqrt() + (y.abs() + 1).rsqrt() + x.sigmoid() + y.floor() * x.ceil(),
}


@pytest.mark.parametrize("op", ELEMENTWISE)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), pytest.param(torch.float64, 1e-12, marks=full)]
)
@pytest.mark.parametrize("target", [80, pytest.param(90, marks=full)])
def test_elementwise(op, dtype, tolerance, target):
    if op == "extrema" and dtype == torch.float64 and target == 90:
        dtype = torch.float32  # Triton cannot compile tl.clamp of float64 for sm_90
    x, y = torch.randn(256, dtype=dtype), torch.randn(256, dtype=dtype)
    out = torch.zeros_like(x)
    clean(elementwise, (1,), [x, y, out], dict(OP=op, BLOCK=256), target=target)
    assert_close(out, ELEMENTWISE[op](x.double(), y.double()), tolerance)


@triton.jit
def cast(X, Out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(Out + offsets, tl.load(X + offsets).to(Out.dtype.element_ty))


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool]
DTYPES += [torch.int8, torch.int16, torch.int32, torch.int64]


@TARGETS
@pytest.mark.parametrize("source", [d if d == torch.bfloat16 else pytest.param(d, marks=full) for d in DTYPES], ids=str)
def test_casts(source, target):
    x = torch.arange(-64, 64)
    x = (x.abs() if source == torch.bool else x).to(source)
    for dtype in DTYPES:
        out = torch.zeros(128, dtype=dtype)
        clean(cast, (1,), [x, out], dict(BLOCK=128), target=target)
        assert torch.equal(out, x.to(dtype)), dtype


@triton.jit
def far_offsets(X, Out, n, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    far = program * 3_000_000_000 + tl.arange(0, BLOCK)
    tl.store(Out + program * BLOCK + tl.arange(0, BLOCK), far // 7 + far % 1_000_003 + (far * far >> 3) ^ (far << 2))
    tl.store(X + program * BLOCK + (far - program * n), tl.arange(0, BLOCK))


@TARGETS
def test_offsets_of_64_bits(target):
    out, x = torch.zeros(4, 128, dtype=torch.int64), torch.zeros(4, 128, dtype=torch.int32)
    clean(far_offsets, (4,), [x, out, 3_000_000_000], dict(BLOCK=128), target=target)
    far = torch.arange(4)[:, None] * 3_000_000_000 + torch.arange(128)
    assert torch.equal(out, far // 7 + far % 1_000_003 + (far * far >> 3) ^ (far << 2))
    assert torch.equal(x, torch.arange(128, dtype=torch.int32).expand(4, 128))


@triton.jit
def near_offsets(X, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * n + tl.arange(0, BLOCK)
    tl.store(X + offsets, offsets)


def test_an_offset_that_overflows_32_bits_is_out_of_bounds():
    report = run(near_offsets, (3,), [torch.zeros(128, dtype=torch.int32), 1_500_000_000], dict(BLOCK=128))
    line = near_offsets.fn.__code__.co_firstlineno + 3
    assert report.kinds() == ["oob"] and report[0].where.endswith(f"test_triton_language.py:{line}")


@triton.jit
def scans(X, Sum, Reverse, Largest, Where, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None]
    x = tl.load(X + at)
    tl.store(Sum + at, tl.cumsum(x, AXIS))
    tl.store(Reverse + at, tl.cumsum(x, AXIS, reverse=True))
    largest, where = tl.max(x, AXIS, return_indices=True)
    rest: tl.constexpr = COLUMNS if AXIS == 0 else ROWS
    tl.store(Largest + tl.arange(0, rest), largest)
    tl.store(Where + tl.arange(0, rest), where)


@TARGETS
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=full), torch.int64])
@pytest.mark.parametrize("axis", [pytest.param(0, marks=full), 1])
def test_scans_and_reductions(axis, dtype, target):
    x = torch.randint(1, 4, (32, 64)).to(dtype)
    sums, reverse, rest = torch.zeros_like(x), torch.zeros_like(x), (64, 32)[axis]
    largest, where = torch.zeros(rest, dtype=dtype), torch.zeros(rest, dtype=torch.int32)
    clean(scans, (1,), [x, sums, reverse, largest, where], dict(AXIS=axis, ROWS=32, COLUMNS=64), target=target)
    assert torch.equal(sums, x.cumsum(axis)) and torch.equal(largest, x.amax(axis))
    assert torch.equal(reverse, x.flip(axis).cumsum(axis).flip(axis))
    assert torch.equal(where.long(), x.argmax(axis)) or torch.equal(
        x.gather(axis, where.long().unsqueeze(axis)).squeeze(axis), largest
    )


@triton.jit
def order(X, Sorted, Top, Histogram, N: tl.constexpr, K: tl.constexpr, BINS: tl.constexpr):
    rows, columns = tl.arange(0, 4)[:, None], tl.arange(0, N)[None]
    x = tl.load(X + rows * N + columns)
    tl.store(Sorted + rows * N + columns, tl.sort(x, 1))
    tl.store(Top + rows * K + tl.arange(0, K)[None], tl.topk(x, K))
    tl.store(Histogram + tl.arange(0, BINS), tl.histogram(tl.reshape(x, (4 * N,)), BINS))


@TARGETS
def test_sort_topk_and_histogram(target):
    x = torch.randint(0, 16, (4, 64), dtype=torch.int32)
    ordered, top, bins = torch.zeros_like(x), torch.zeros(4, 8, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    clean(order, (1,), [x, ordered, top, bins], dict(N=64, K=8, BINS=16), target=target)
    assert torch.equal(ordered, x.sort(1)[0]) and torch.equal(top, x.topk(8, 1)[0])
    assert torch.equal(bins.long(), torch.bincount(x.flatten(), minlength=16))


@triton.jit
def scatter_add(X, Index, Sum, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.atomic_add(Sum + tl.load(Index + offsets, mask), tl.load(X + offsets, mask), mask=mask, sem="relaxed")


@TARGETS
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, pytest.param(torch.float16, marks=full)])
@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_atomic_add(dtype, schedule, target):
    x, index = torch.randint(-3, 4, (512,)).to(dtype), torch.randint(0, 24, (512,), dtype=torch.int32)
    out = torch.zeros(24, dtype=dtype)
    clean(scatter_add, (4,), [x, index, out, 500], dict(BLOCK=128), target=target, schedule=schedule)
    expected = torch.zeros(24, dtype=torch.float64).index_add_(0, index[:500].long(), x[:500].double())
    assert torch.equal(out.double(), expected)


@triton.jit
def locked_sum(X, Lock, Sum, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(X + tl.program_id(0) * BLOCK + offsets)
    while tl.atomic_cas(Lock, 0, 1) == 1:
        pass
    tl.store(Sum + offsets, tl.load(Sum + offsets) + x)
    tl.debug_barrier()
    tl.atomic_xchg(Lock, 0)


@TARGETS
@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_spin_lock(schedule, target):
    x, lock, out = torch.randint(-9, 9, (4, 128)).float(), torch.zeros(1, dtype=torch.int32), torch.zeros(128)
    clean(locked_sum, (4,), [x, lock, out], dict(BLOCK=128), target=target, schedule=schedule, limit=10**6)
    assert torch.equal(out, x.sum(0))


@triton.jit
def matmul(A, B, C, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, TRANS: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None], tl.arange(0, K)
    if TRANS:
        a = tl.trans(tl.load(A + k[:, None] * M + tl.arange(0, M)[None]))
    else:
        a = tl.load(A + m * K + k[None])
    b = tl.load(B + k[:, None] * N + n)
    tl.store(C + m * N + n, tl.dot(a, b, input_precision=PRECISION, out_dtype=C.dtype.element_ty))


DOTS = [  # operands, precision, result, tolerance
    (torch.bfloat16, None, torch.float32, 1e-4),
    pytest.param(torch.float16, None, torch.float32, 1e-4, marks=full),
    pytest.param(torch.float16, None, torch.float16, 3e-2, marks=full),
    (torch.float32, "tf32", torch.float32, 3e-2),
    pytest.param(torch.float32, "ieee", torch.float32, 1e-4, marks=full),
    pytest.param(torch.float32, "tf32x3", torch.float32, 1e-4, marks=full),
    pytest.param(torch.float64, None, torch.float64, 1e-10, marks=full),
    pytest.param(torch.int8, None, torch.int32, 0, marks=full),
]


@TARGETS
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "precision", "out", "tolerance"), DOTS)
@pytest.mark.parametrize(
    "shape", [(64, 64, 32), pytest.param((16, 16, 32), marks=full), pytest.param((64, 128, 64), marks=full)]
)
def test_dot(shape, dtype, precision, out, tolerance, transposed, target):
    m, n, k = shape
    a, b = (torch.randint(-9, 9, s) if dtype == torch.int8 else torch.randn(s) for s in ((m, k), (k, n)))
    a, b, c = a.to(dtype), b.to(dtype), torch.zeros(m, n, dtype=out)
    constexprs = dict(M=m, N=n, K=k, PRECISION=precision, TRANS=transposed)
    clean(matmul, (1,), [a.T.contiguous() if transposed else a, b, c], constexprs, target=target)
    assert_close(c, a.double() @ b.double(), tolerance)


@triton.jit
def pipelined_matmul(A, B, C, K, N, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    rows, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, K, 32, num_stages=STAGES):
        k = start + tl.arange(0, 32)
        a = tl.load(A + rows[:, None] * K + k[None], mask=k[None] < K, other=0.0)
        b = tl.load(B + k[:, None] * N + columns[None], mask=(k[:, None] < K) & (columns[None] < N), other=0.0)
        total = tl.dot(a, b, total)
    tl.store(C + rows[:, None] * N + columns[None], total, mask=columns[None] < N)


@TARGETS
@pytest.mark.parametrize("schedule", ["lockstep", "random"])
@pytest.mark.parametrize("stages", [pytest.param(1, marks=full), 3])
def test_software_pipeline(stages, schedule, target):
    a, b, c = torch.randn(64, 136).bfloat16(), torch.randn(136, 72).bfloat16(), torch.zeros(64, 72)
    constexprs = dict(BLOCK=64, STAGES=stages)
    clean(pipelined_matmul, (1, 2), [a, b, c, 136, 72], constexprs, target=target, schedule=schedule)
    assert_close(c, a.double() @ b.double(), 1e-3)


@triton.jit(debug=True)
def positive(X, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    tl.device_assert(x >= 0, "negative")
    tl.device_print("x", x)


@TARGETS
def test_device_assert(target):
    x = torch.rand(256)
    clean(positive, (1,), [x], dict(BLOCK=256), target=target)
    x[77] = -1
    assert run(positive, (1,), [x], dict(BLOCK=256), target=target).kinds() == ["assert"]


@triton.jit
def through_fp8(X, Out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(Out + offsets, tl.load(X + offsets).to(tl.float8e4nv).to(tl.float32))


def test_what_is_not_emulated_is_named():
    with pytest.raises(Unsupported, match="cvt"):
        run(through_fp8, (1,), [torch.randn(128), torch.zeros(128)], dict(BLOCK=128), target=90)
