"""What the lanes of a warp do together: shuffles, votes, reductions, matrix loads, tensor cores (mma, wgmma).

Tensor-core operands lie scattered over the lanes of a warp. The layout functions give, for each element of a matrix,
its place in the stacked registers (register, lane, part), as drawn in the PTX ISA manual.
"""

import functools
import re

import numpy as np

from heiretsu.offgpu.emulator.batch import WARP, WARPGROUP
from heiretsu.offgpu.emulator.numerics import FLOAT, SIGNED, UNSIGNED, bf16_to_f32, halves, pack2
from heiretsu.offgpu.emulator.report import PTXError, Unsupported

OPERAND_BITS = {"f64": 64, "tf32": 32, "f16": 16, "bf16": 16, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}


@functools.cache
def mma_layout(k: int, per_register: int, a_registers: int, b_registers: int):
    """Places of the elements of A (16, k), B (k, 8), and of each register of C in the flat (16, 8) result."""
    a, b = np.zeros((16, k), np.int64), np.zeros((k, 8), np.int64)
    c = np.zeros((4, WARP), np.int64)
    for lane in range(WARP):
        group, member = lane >> 2, lane & 3
        for i in range(per_register):
            column = per_register * member + i
            for r in range(a_registers):
                place = (r * WARP + lane) * per_register + i
                a[group + 8 * (r & 1), column + 4 * per_register * (r >> 1)] = place
            for r in range(b_registers):
                b[column + 4 * per_register * r, group] = (r * WARP + lane) * per_register + i
        for r in range(4):
            c[r, lane] = (group + 8 * (r >> 1)) * 8 + 2 * member + (r & 1)
    return a, b, c


def decode(words, type_name):
    """Packed words -> numbers; the last axis grows by the elements in a word."""
    words = np.ascontiguousarray(words)
    if type_name == "tf32":
        return (words.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    if type_name == "f64":
        return words.view(np.float64)
    if type_name == "f16":
        return words.view(np.float16).astype(np.float32)
    if type_name == "bf16":
        return bf16_to_f32(words.view(np.uint16))
    if type_name in ("s8", "u8"):
        return words.view(np.int8 if type_name == "s8" else np.uint8).astype(np.float64)
    raise Unsupported(f"tensor core operand {type_name}")


class WarpUnit:
    """Executes warp-wide instructions for a batch. Methods are what the translated code calls."""

    def __init__(self, kernel, batch, memory, report):
        self.kernel, self.batch, self.memory, self.report = kernel, batch, memory, report
        self.issued, self.committed = [], []  # shared reads of wgmmas: of the open group, of groups not waited for

    def _converged(self, mask, what, line):
        """A .sync instruction needs all lanes of each warp."""
        if mask is not None:
            active = self.batch.by_warp(mask)
            partial = active.any(1) & ~active.all(1)
            if partial.any():
                text = f"{what} with some lanes of a warp absent"
                self.report.add("divergence", self.kernel.where(line), text, partial.sum())

    def _stack(self, registers, warps):
        """(warps, registers, 32)."""
        stacked = np.array([self.batch.whole(register) for register in registers]).reshape(len(registers), -1, WARP)
        return (stacked if len(warps) == self.batch.num_warps else stacked[:, warps]).swapaxes(0, 1)

    # ---- shuffles and votes

    def shuffle(self, mode, value, offset, clamp, mask, line):
        """(value of the source lane, whether the source is in range)."""
        self._converged(mask, "shfl.sync", line)
        offset = self.batch.whole(offset).astype(np.int64) & 31
        clamp = self.batch.whole(clamp).astype(np.int64)
        lane, bound, segment = self.batch.lane, clamp & 31, (clamp >> 8) & 31
        last = (lane & segment) | (bound & ~segment)
        source = {
            "up": lane - offset,
            "down": lane + offset,
            "bfly": lane ^ offset,
            "idx": (lane & segment) | (offset & ~segment),
        }[mode]
        in_range = source >= last if mode == "up" else source <= last
        source = np.where(in_range, source, lane)
        return self.batch.whole(value)[self.batch.warp * WARP + source], in_range

    def vote(self, mode, predicate, mask):
        active = self.batch.mask(mask).reshape(-1, WARP)
        votes = self.batch.by_warp(predicate) & active
        if mode == "ballot":
            weights = votes.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
            return np.repeat(weights.sum(1).astype(np.uint32), WARP)
        return np.repeat(votes.any(1) if mode == "any" else (votes | ~active).all(1), WARP)

    def reduce(self, op, type_name, value, mask):
        """redux.sync: the reduction over the active lanes of each warp, in every lane."""
        kind = {"s": SIGNED[32], "f": FLOAT[32]}.get(type_name[0], UNSIGNED[32])
        is_float = kind is FLOAT[32]
        function = {
            "add": np.add,
            "min": np.fmin if is_float else np.minimum,
            "max": np.fmax if is_float else np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[op]
        values = self.batch.whole(value).copy().view(kind).reshape(-1, WARP)
        active = self.batch.mask(mask).reshape(-1, WARP)
        result: np.ndarray = np.zeros(len(values), kind)
        for w in np.flatnonzero(active.any(1)):
            result[w] = function.reduce(values[w][active[w]], dtype=kind)
        return np.repeat(result, WARP).view(np.uint32)

    # ---- 8x8 matrices of 16-bit elements in shared memory: lane 8i+r holds the address of row r of matrix i

    def _matrix_rows(self, count, address, mask, line):
        """(warps, their lanes that give addresses, byte index of each row in shared memory)."""
        warps = self.batch.active_warps(mask)
        address = self.batch.by_warp(address)[warps, : 8 * count].astype(np.int64)
        lanes = (warps[:, None] * WARP + np.arange(8 * count)).reshape(-1)
        return warps, lanes, self.memory.checked_index("shared", address.reshape(-1), lanes, 16, line)

    def load_matrices(self, count, transposed, address, mask, line):
        """ldmatrix: lane l gets elements 2(l%4), 2(l%4)+1 of row l/4 (transposed: of column l/4)."""
        self._converged(mask, "ldmatrix", line)
        warps, lanes, index = self._matrix_rows(count, address, mask, line)
        memory = self.memory
        if memory.check:
            memory.shared_races.read(index, 16, lanes, lambda: self.kernel.where(line))
        matrices = memory.shared.view(np.uint16)[(index >> 1)[:, None] + np.arange(8)].reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(len(warps), count, WARP)
        return self.batch.from_warps(words, warps)

    def store_matrices(self, transposed, address, values, mask, line):
        """stmatrix, the inverse."""
        self._converged(mask, "stmatrix", line)
        count = len(values)
        warps, lanes, index = self._matrix_rows(count, address, mask, line)
        matrices = np.ascontiguousarray(self._stack(values, warps)).view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        rows = np.ascontiguousarray(matrices).reshape(-1, 8)
        memory = self.memory
        if memory.check:
            memory.shared_races.write(index, 16, lanes, rows, lambda: self.kernel.where(line))
        memory.shared.view(np.uint16)[(index >> 1)[:, None] + np.arange(8)] = rows

    # ---- mma.sync: one warp, D = A B + C with D (16, 8)

    def mma(self, shape, a_type, b_type, c_type, a, b, c, mask, line):
        self._converged(mask, "mma", line)
        warps = self.batch.active_warps(mask)
        m, n, k = map(int, re.match(r"m(\d+)n(\d+)k(\d+)", shape).groups())
        if a_type == "f64" and (m, n, k) == (8, 8, 4):
            return self._mma_f64_small(a, b, c, warps)
        if (m, n) != (16, 8) or a_type not in OPERAND_BITS:
            raise Unsupported(f"mma {shape} {a_type}")
        per_register = max(32 // OPERAND_BITS[a_type], 1)
        a_at, b_at, c_at = mma_layout(k, per_register, len(a), len(b))
        a = decode(self._stack(a, warps), a_type).reshape(len(warps), -1)[:, a_at]
        b = decode(self._stack(b, warps), b_type).reshape(len(warps), -1)[:, b_at]
        product = (a @ b).reshape(len(warps), 128)[:, c_at]  # (warps, 4, 32)
        return self._accumulate(product, c, c_type, warps)

    def _accumulate(self, product, c, c_type, warps):
        c = self._stack(c, warps)
        if c_type == "f64":
            result = (product + c.view(np.float64)).view(np.uint64)
        elif c_type == "f32":
            result = (product + c.view(np.float32)).astype(np.float32).view(np.uint32)
        elif c_type == "s32":
            total = product.astype(np.int64) + c.view(np.int32)
            result = np.clip(total, -(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)
        elif c_type == "f16":  # a register packs two neighbours of a row
            c = np.ascontiguousarray(c).view(np.float16).reshape(len(warps), 2, WARP, 2)
            pairs = np.stack([product[:, 0:2].transpose(0, 2, 1), product[:, 2:4].transpose(0, 2, 1)], 1)
            result = np.ascontiguousarray((pairs + c).astype(np.float16)).view(np.uint32).reshape(len(warps), 2, WARP)
        else:
            raise Unsupported(f"mma accumulator {c_type}")
        return self.batch.from_warps(result, warps)

    def _mma_f64_small(self, a, b, c, warps):
        a = self._stack(a, warps)[:, 0].view(np.float64).reshape(len(warps), 8, 4)
        b = self._stack(b, warps)[:, 0].view(np.float64).reshape(len(warps), 8, 4)
        product = (a @ b.transpose(0, 2, 1)).reshape(len(warps), WARP, 2).transpose(0, 2, 1)
        return self.batch.from_warps((product + self._stack(c, warps).view(np.float64)).view(np.uint64), warps)

    # ---- wgmma: one warpgroup, D (64, n). Done at issue; its reads of shared memory count again at the wait

    def wgmma(self, shape, d_type, a_type, b_type, d, a, b, keep, scale_a, scale_b, a_trans, b_trans, mask, line):
        """A: registers (list) or a shared-memory descriptor; B: a descriptor; keep: add to D rather than replace it."""
        n, k = map(int, re.match(r"m64n(\d+)k(\d+)", shape).groups())
        if self.batch.threads % WARPGROUP:
            raise PTXError("wgmma needs whole warpgroups")
        active = self.batch.mask(mask).reshape(-1, WARPGROUP)
        if (active.any(1) & ~active.all(1)).any():
            self.report.add("divergence", self.kernel.where(line), "wgmma with part of a warpgroup")
        groups = np.flatnonzero(active.any(1))
        warps = (groups[:, None] * 4 + np.arange(4)).reshape(-1)
        if isinstance(a, list):
            a_at = mma_layout(k, 32 // OPERAND_BITS[a_type], 4, 2)[0]
            a = decode(self._stack(a, warps), a_type).reshape(len(warps), -1)[:, a_at].reshape(len(groups), 64, k)
        else:
            a = self._shared_operand(a, 64, a_trans, a_type, groups, line)
        b = self._shared_operand(b, n, b_trans, b_type, groups, line)
        product = (a * scale_a) @ (b * scale_b).transpose(0, 2, 1)
        product = product.reshape(len(warps), 16, n)  # each warp holds 16 rows
        lane, register = np.arange(WARP), np.arange(n // 2)[:, None]
        row, column = (lane >> 2) + 8 * (register >> 1 & 1), 8 * (register >> 2) + 2 * (lane & 3) + (register & 1)
        product = product[:, row, column]  # (warps, registers, 32)
        keep = self.batch.by_warp(keep)[warps][:, :1][..., None]
        return self.batch.from_warps(self._wgmma_sum(product, self._stack(d, warps), keep, d_type), warps)

    def _wgmma_sum(self, product, d, keep, d_type):
        if d_type == "f32":
            return np.where(keep, product + d.view(np.float32), product).astype(np.float32).view(np.uint32)
        if d_type == "s32":
            product = product.astype(np.int64)
            return np.where(keep, product + d.view(np.int32), product).astype(np.int32).view(np.uint32)
        if d_type == "f16":  # register q packs accumulators 2q and 2q+1
            d = np.stack([h.view(np.float16).astype(np.float32) for h in halves(d)], 2).reshape(product.shape)
            total = np.where(keep, product + d, product).astype(np.float16).view(np.uint16)
            return pack2(total[:, 0::2], total[:, 1::2])
        raise Unsupported(f"wgmma accumulator {d_type}")

    def _shared_operand(self, descriptor, rows, mn_major, type_name, groups, line):
        """(groups, rows, k) numbers behind a matrix descriptor: 32 bytes along k, swizzled by its mode."""
        descriptor = self.batch.whole(descriptor).reshape(-1, WARPGROUP)[groups]
        if (descriptor != descriptor[:, :1]).any():
            raise PTXError("wgmma descriptor differs inside a warpgroup")
        descriptor = descriptor[:, 0].astype(np.uint64)

        def bits(low, count):
            field = (descriptor >> np.uint64(low)) & np.uint64((1 << count) - 1)
            return field.astype(np.int64)[:, None, None]

        start, leading, stride, mode = bits(0, 14) * 16, bits(16, 14) * 16, bits(32, 14) * 16, bits(62, 2)
        if bits(49, 3).any() or (mode != mode[0]).any():
            raise Unsupported("wgmma base offset")
        swizzle = int(mode.max())
        span = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]
        if not mn_major:
            row, chunk = np.arange(rows)[:, None], np.arange(2)[None]
            address = start + row % 8 * span + row // 8 * stride + (chunk * 16 if swizzle else chunk * leading)
        else:
            row, byte = np.arange(16)[:, None], np.arange(rows // 8)[None] * 16
            if swizzle:
                address = start + byte % span + byte // span * leading + row % 8 * span + row // 8 * stride
            else:
                address = start + byte // 16 * stride + row % 8 * 16 + row // 8 * leading
        address = address ^ (((address >> 7) & (span // 16 - 1)) << 4)
        memory = self.memory
        if (address + 16 > memory.shared_bytes).any():
            raise PTXError("wgmma operand outside shared memory")
        index = address + (self.batch.slot[groups * WARPGROUP] * memory.shared_bytes)[:, None, None]
        words = memory.shared.view(np.uint64)[(index >> 3)[..., None] + np.arange(2)]
        numbers = decode(np.ascontiguousarray(words).reshape(*words.shape[:2], -1), type_name)
        if memory.check:
            self.issued.append((index.reshape(len(groups), -1), groups * WARPGROUP, line))
            self._read_by_groups(*self.issued[-1])
        return numbers.transpose(0, 2, 1) if mn_major else numbers

    def _read_by_groups(self, index, first_lanes, line):
        self.memory.shared_races.read_by_warpgroups(index, first_lanes, lambda: self.kernel.where(line))

    def wgmma_commit(self):
        self.committed.append(self.issued)
        self.issued = []

    def wgmma_wait(self, pending):
        while len(self.committed) > pending:
            for read in self.committed.pop(0):
                self._read_by_groups(*read)
