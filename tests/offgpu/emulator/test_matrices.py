"""Matrix loads and tensor cores, against the fragment layouts drawn in the PTX ISA manual."""

import pytest
import torch

from tests.offgpu.emulator.ptx_text import with_shared

WARP = range(32)


def words_of(tensor):
    """A tensor's bytes as int32."""
    return tensor.contiguous().view(-1).view(torch.int32)


def copy_to_shared(num_words, threads):
    """Every thread copies its part of the source to shared memory, then all wait."""
    lines = ["shl.b32 %u,%t,2; mul.wide.u32 %z,%u,1; add.s64 %x,%x,%z; add.u32 %v,%s,%u;"]
    for offset in range(0, 4 * num_words, 4 * threads):
        lines.append(f"ld.global.b32 %w,[%x+{offset}]; st.shared.b32 [%v+{offset}],%w;")
    return " ".join([*lines, "bar.sync 0;"])


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(transposed):
    """Lane l of ldmatrix gets elements 2(l%4), 2(l%4)+1 of row l/4; stmatrix puts them back."""
    source = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)  # four matrices, one below the other
    out, back = torch.zeros(4, 32, 2, dtype=torch.int16), torch.zeros(4, 8, 8, dtype=torch.int16)
    trans = ".trans" if transposed else ""
    load = copy_to_shared(128, 32) + (
        f"shl.b32 %u,%t,4; add.u32 %u,%u,%s; ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r0,%r1,%r2,%r3}},[%u];"
    )
    write = "shl.b32 %v,%t,2; mul.wide.u32 %z,%v,1; add.s64 %y,%y,%z; "
    write += " ".join(f"st.global.b32 [%y+{128 * i}],%r{i};" for i in range(4))
    assert not with_shared(load + write, words_of(source), words_of(out), threads=32)
    for lane in WARP:
        for i in range(4):
            matrix = source[i].T if transposed else source[i]
            assert out[i, lane].tolist() == matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()

    store = f"bar.sync 0; stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%u+512],{{%r0,%r1,%r2,%r3}}; bar.sync 0;"
    read = "shl.b32 %v,%t,2; mul.wide.u32 %z,%v,1; add.s64 %y,%y,%z; add.u32 %v,%v,%s; "
    read += " ".join(f"ld.shared.b32 %w,[%v+{512 + 128 * i}]; st.global.b32 [%y+{128 * i}],%w;" for i in range(4))
    assert not with_shared(load + store + read, words_of(source), words_of(back), threads=32)
    assert torch.equal(back, source)


def fragment(matrix, rows, columns, parts):
    """(registers, lanes, parts): element rows[r](lane), columns[r](lane, part) of the matrix."""
    return torch.stack(
        [
            torch.stack([torch.stack([matrix[row(lane), column(lane, i)] for i in range(parts)]) for lane in WARP])
            for row, column in zip(rows, columns, strict=True)
        ]
    )


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_mma_m16n8k16(name, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((16, 16), (8, 16)))  # b: (n, k)
    c = torch.randn(16, 8, generator=generator)
    low, high = (lambda lane: lane // 4), (lambda lane: lane // 4 + 8)
    left, right = (lambda lane, i: 2 * (lane % 4) + i), (lambda lane, i: 2 * (lane % 4) + i + 8)
    a_words = words_of(fragment(a, (low, high, low, high), (left, left, right, right), 2))
    b_words = words_of(fragment(b, (low, low), (left, right), 2))
    c_fragment = fragment(c, (low, high), (left, left), 2)  # (2, lanes, 2): registers 2r and 2r+1 of each lane
    c_words = words_of(c_fragment.permute(0, 2, 1))
    source = torch.cat([a_words, b_words, c_words])
    out = torch.zeros(4, 32)
    body = "shl.b32 %u,%t,2; mul.wide.u32 %z,%u,1; add.s64 %x,%x,%z; add.s64 %y,%y,%z; "
    body += " ".join(f"ld.global.b32 %r{i},[%x+{128 * i}];" for i in range(10))
    body += f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 {{%r6,%r7,%r8,%r9}},"
    body += "{%r0,%r1,%r2,%r3},{%r4,%r5},{%r6,%r7,%r8,%r9}; "
    body += " ".join(f"st.global.b32 [%y+{128 * i}],%r{6 + i};" for i in range(4))
    assert not with_shared(body, source, words_of(out), threads=32)
    expected = a.float() @ b.float().T + c
    expected = fragment(expected, (low, high), (left, left), 2).permute(0, 2, 1).reshape(4, 32)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("schedule", ["lockstep", "random"])
def test_wgmma_with_both_operands_in_shared_memory(schedule):
    """Without swizzle an operand is 8x8 core matrices of 128 bytes: first along k, then along its rows."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((64, 16), (8, 16)))

    def core_matrices(matrix):
        return matrix.view(-1, 8, 2, 8).permute(0, 2, 1, 3)

    source = torch.cat([words_of(core_matrices(a)), words_of(core_matrices(b)), torch.zeros(64, dtype=torch.int32)])
    out = torch.zeros(4, 128)
    descriptor = (128 >> 4) << 16 | (256 >> 4) << 32  # bytes to the next core matrix along k, along the rows
    body = copy_to_shared(640, 128) + "wgmma.fence.sync.aligned; "
    body += f"mov.b64 %x,{descriptor}; mov.b64 %z,{descriptor | 2048 >> 4}; setp.ne.u32 %p1,0,0; "
    body += "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r0,%r1,%r2,%r3},%x,%z,%p1,1,1,0,0; "
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; "
    body += "shl.b32 %u,%t,2; mul.wide.u32 %z,%u,1; add.s64 %y,%y,%z; "
    body += " ".join(f"st.global.b32 [%y+{512 * i}],%r{i};" for i in range(4))
    assert not with_shared(body, source, words_of(out), schedule=schedule)
    expected = a.float() @ b.float().T
    for thread in range(128):
        row, column = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
        places = [(row, column), (row, column + 1), (row + 8, column), (row + 8, column + 1)]
        torch.testing.assert_close(out[:, thread], torch.stack([expected[place] for place in places]))
