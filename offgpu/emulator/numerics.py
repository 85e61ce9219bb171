"""Arithmetic of PTX on NumPy arrays: what NumPy lacks, or defines differently.

Registers are unsigned integers of their width; a view gives them a sign or makes them floats. Approximate instructions
(ex2, lg2, rcp, rsqrt, sin, cos, tanh) are NumPy's functions, so more exact than a GPU.
"""

import numpy as np

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


# ---- floats


def bf16_to_f32(x):
    return (np.asarray(x).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x, toward_zero=False):
    """Round to nearest even (or truncate); every NaN becomes 0x7fff, as cvt does."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits if toward_zero else bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded >> np.uint32(16)).astype(np.uint16)


def ftz(x):
    """Flush float32 denormals to a zero of the same sign."""
    if x.dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.float32(1.1754944e-38), np.copysign(np.float32(0), x), x)


def halves(x):
    """Low and high 16 bits of a packed pair."""
    x = np.asarray(x)
    return (x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)


def pack2(low, high):
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def fma(a, b, c):
    """a*b + c; float16 and float32 go through float64, which rounds twice in rare cases."""
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def fcmp(how, a, b):
    """Float comparison: plain forms are false for NaN, "..u" forms true; "num" and "nan" test for it."""
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("num", "nan"):
        return unordered if how == "nan" else ~unordered
    result = _COMPARE[how[:2]](a, b)
    if len(how) == 3:
        return result | unordered
    return result & ~unordered if how == "ne" else result


def f2i(x, dtype, mode):
    """Float to integer, rounding by mode (z, n, m, p); saturates, NaN becomes 0."""
    info = np.iinfo(dtype)
    x = np.asarray(x).astype(np.float64)
    x = {"z": np.trunc, "n": np.rint, "m": np.floor, "p": np.ceil}[mode](x)
    high, low = x >= float(info.max), x <= float(info.min)
    inside = np.where(np.isnan(x) | high | low, 0, x).astype(dtype)
    return np.where(high, info.max, np.where(low, info.min, inside)).astype(dtype)


# ---- integers


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def icmp(how, a, b):
    return _COMPARE[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)](a, b)


def idiv(a, b):
    """Division that truncates toward zero; by zero gives all ones (unsigned) or something (signed), no error."""
    divisor = np.where(b == 0, 1, b).astype(a.dtype)
    if a.dtype.kind == "u":
        return np.where(b == 0, ~np.zeros_like(a), a // divisor).astype(a.dtype)
    quotient = a // divisor
    remainder = a - quotient * divisor
    return (quotient + ((remainder != 0) & ((a < 0) != (divisor < 0))).astype(a.dtype)).astype(a.dtype)


def irem(a, b):
    return (a - idiv(a, b) * b).astype(a.dtype)


def mulhi(a, b):
    """Upper half of the double-width product."""
    if a.dtype.itemsize < 8:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(a.dtype.itemsize * 8)).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = ua & mask, ua >> half, ub & mask, ub >> half
    t = al * bh + ((al * bl) >> half)
    u = ah * bl + (t & mask)
    high = ah * bh + (t >> half) + (u >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, ub, 0).astype(np.uint64) - np.where(b < 0, ua, 0).astype(np.uint64)
    return high.view(a.dtype)


def _low_mask(length):
    """Integers with the lowest `length` bits set, 0 <= length <= 64."""
    ones = (np.uint64(1) << np.minimum(length, 63).astype(np.uint64)) - np.uint64(1)
    return np.where(length >= 64, ~np.uint64(0), ones).astype(np.uint64)


def bfe(a, position, length, signed):
    """Bit-field extract; signed fields repeat the sign bit, also past the end of the register."""
    width = a.dtype.itemsize * 8
    position = position.astype(np.int64) & 255
    length = np.minimum(length.astype(np.int64) & 255, width)
    bits = a.astype(np.uint64)
    shifted = np.where(position < 64, bits >> np.minimum(position, 63).astype(np.uint64), 0)
    whole = np.uint64((1 << width) - 1)
    result = shifted & _low_mask(length) & whole
    if signed:
        sign_at = np.maximum(np.minimum(position + length - 1, width - 1), 0).astype(np.uint64)
        negative = ((bits >> sign_at) & np.uint64(1)) == 1
        present = np.minimum(length, np.maximum(width - position, 0))
        result = np.where(negative & (length > 0), result | ~_low_mask(present), result)
    return (result & whole).astype(UNSIGNED[width])


def bfi(a, b, position, length):
    """Bit-field insert: `length` low bits of a into b at `position`."""
    width = np.uint64(a.dtype.itemsize * 8)
    position = np.minimum(position.astype(np.uint64) & np.uint64(255), np.uint64(63))
    length = np.minimum(length.astype(np.uint64) & np.uint64(255), width)
    mask = _low_mask(length) << position
    return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << position) & mask)).astype(a.dtype)


def prmt(a, b, selector):
    """Byte permute: each nibble picks one of the 8 bytes of (b, a), its top bit replicates that byte's sign."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    selector, result = selector.astype(np.uint64), np.uint64(0)
    for i in range(4):
        nibble = (selector >> np.uint64(4 * i)) & np.uint64(15)
        byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | (np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i))
    return np.asarray(result).astype(np.uint32)


def lop3(a, b, c, table):
    """Any logic function of three inputs, given as its truth table of 8 bits."""
    result = np.uint32(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def popc(x):
    return np.bitwise_count(np.asarray(x)).astype(np.uint32)


def clz(x):
    x = np.asarray(x)
    width = x.dtype.itemsize * 8
    for shift in (1, 2, 4, 8, 16, 32):
        if shift < width:
            x = x | (x >> x.dtype.type(shift))
    return (width - np.bitwise_count(x)).astype(np.uint32)


def brev(x):
    x = np.asarray(x)
    width, one, result = x.dtype.itemsize * 8, x.dtype.type, np.zeros_like(x)
    for i in range(width):
        result |= ((x >> one(i)) & one(1)) << one(width - 1 - i)
    return result


def shf(direction, low, high, amount, clamp):
    """Funnel shift of the pair (high, low)."""
    amount = np.minimum(amount, np.uint32(32)) if clamp else amount & np.uint32(31)
    both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
    amount = amount.astype(np.uint64)
    return (((both << amount) >> np.uint64(32)) if direction == "l" else (both >> amount)).astype(np.uint32)


# ---- one lane of an atomic


def atomic(op, type_name, old, value, compare):
    """New contents of a memory cell: scalars, unsigned of the cell's width, in and out."""
    if op == "exch":
        return value
    if op == "cas":
        return compare if old == value else old
    if op in ("and", "or", "xor"):
        return {"and": old & value, "or": old | value, "xor": old ^ value}[op]
    if type_name in ("f16x2", "bf16x2"):
        half = type_name[:-2]
        return pack2(*(_atomic_float(op, half, o, v) for o, v in zip(halves(old), halves(value), strict=True)))
    if "f" in type_name:
        return _atomic_float(op, type_name, old, value)
    cell = type(old)
    if op == "inc":
        return cell(0) if old >= value else old + cell(1)
    if op == "dec":
        return value if old == 0 or old > value else old - cell(1)
    kind = SIGNED[old.itemsize * 8] if type_name[0] == "s" else cell
    function = {"add": np.add, "min": np.minimum, "max": np.maximum}[op]
    return np.asarray(function(old.view(kind), value.view(kind)), kind).view(cell)


def _atomic_float(op, type_name, old, value):
    function = {"add": np.add, "min": np.fmin, "max": np.fmax}[op]
    if type_name == "bf16":
        return f32_to_bf16(function(bf16_to_f32(old), bf16_to_f32(value)))
    kind = FLOAT[old.itemsize * 8]
    return np.asarray(function(old.view(kind), value.view(kind)), kind).view(UNSIGNED[old.itemsize * 8])
