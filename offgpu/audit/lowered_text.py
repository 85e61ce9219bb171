"""What Triton's intermediate texts say and SASS does not: how much a bulk copy moves, how large a tcgen05 MMA is."""

import re

from heiretsu.offgpu.audit.disassembly import decode_tcgen05_shape

_ITEM_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f8E5M2": 1, "f8E4M3FN": 1, "i8": 1, "i32": 4, "i16": 2}
_MMA_DEPTH = {"f16": 16, "tf32": 8}  # K of one tcgen05.mma; 32 for the 8-bit kinds


def bulk_copy_bytes(ttgir: str, warps: int) -> float:
    """Mean bytes that one TMA load instruction moves, over the copies that sit in loops (if none does, over all).

    A copy is cut into boxes of at most 128 bytes a row, and the boxes are spread over the warps, one instruction each.
    """
    in_loops: list[float] = []
    everywhere: list[float] = []
    open_loops: list[int] = []  # their indents
    for line in ttgir.splitlines():
        text = line.lstrip()
        indent = len(line) - len(text)
        if open_loops and indent <= open_loops[-1] and text.startswith("}"):
            open_loops.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            open_loops.append(indent)
        if "async_tma_copy_global_to_local" not in line:
            continue
        size = _copy_bytes(line, warps)
        if size is not None:
            everywhere.append(size)
            if open_loops:
                in_loops.append(size)
    sizes = in_loops or everywhere
    return sum(sizes) / len(sizes) if sizes else 0


def _copy_bytes(line: str, warps: int) -> float | None:
    buffers = [
        (dims, kind)
        for dims, kind in re.findall(r"!ttg\.memdesc<((?:\d+x)+)(\w+),", line)
        if dims.count("x") >= 2 and kind in _ITEM_BYTES
    ]
    if not buffers:
        return None
    text, kind = buffers[-1]
    dims = [int(dim) for dim in text.strip("x").split("x")]
    size = _ITEM_BYTES[kind]
    for dim in dims:
        size *= dim
    boxes = -(-dims[-1] * _ITEM_BYTES[kind] // 128)
    return size / -(-boxes // warps)


def tcgen05_shapes(ptx: str) -> list[tuple[int, int, int]]:
    """(M, N, K) of every tcgen05.mma whose descriptor is an immediate."""
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+),\s*(-?\d+);", ptx))
    shapes = []
    for match in re.finditer(r"tcgen05\.mma\.cta_group::(\d)\.kind::(\w+)\s+([^;]*);", ptx):
        for operand in reversed(re.findall(r"%r\d+|\b\d{6,}\b", match[3])):
            value = constants.get(operand, operand if operand.isdigit() else None)
            shape = decode_tcgen05_shape(None if value is None else int(value) & 0xFFFFFFFF)
            if shape:
                shapes.append((*shape, _MMA_DEPTH.get(match[2], 32)))
                break
    return shapes


def warp_specialised(ttgir: str) -> bool:
    return "ttg.warp_specialize" in ttgir or "warp_specialize.partition" in ttgir
