"""Translation of control flow, memory and warp-wide instructions. Arithmetic is in arithmetic.py.

A handler gets the translator `t` and the operation `op`; it emits a call of what the instruction does on the machine
`M` (memory.py, warp.py) and writes the destination registers.
"""

import re

import numpy as np

from heiretsu.offgpu.emulator.parser import bits_of
from heiretsu.offgpu.emulator.translate import as_list, opcode, split_address

# ---- control flow: what ends a block is returned to the scheduler (machine.py)


@opcode("bra")
def branch(t, op):
    t.emit(f"return ('bra',{t.kernel.labels[op.operands[0]]},{op.guard or True})")


@opcode("ret", "exit")
def leave(t, op):
    t.emit(f"return ('exit',{f'np.broadcast_to({op.guard},M.batch.num_lanes)' if op.guard else True})")


@opcode("trap")
def trap(t, op):
    t.emit(f"M.fail_assertion({op.mask},{op.line})")


@opcode("bar", "barrier")
def barrier(t, op):
    if op.has("warp"):
        return  # lanes of a warp count as ordered
    if op.has("red") or op.has("arrive") or op.guard or not op.operands[0].isdigit():
        raise op.unsupported()
    count = op.operands[1] if len(op.operands) > 1 and op.operands[1].isdigit() else 0
    t.emit(f"return ('bar',{op.operands[0]},{count})")


@opcode(*"membar fence nanosleep prefetch griddepcontrol pmevent discard applypriority".split())
def nothing(t, op):
    """Hints, and fences: accesses happen in program order here."""


@opcode("call")
def call(t, op):
    name = next((x for x in op.operands if isinstance(x, str) and not x.startswith("%")), "?")
    if "assertfail" in name:
        t.emit(f"M.fail_assertion({op.mask},{op.line})")
    elif "vprintf" not in name:  # device_print prints nothing
        t.emit(f"M.unsupported_call({name!r})")


# ---- memory


def space_of(op, spaces):
    return next((s for s in spaces if any(m.split("::")[0] == s for m in op.modifiers)), "generic")


@opcode("ld", "ldu")
def load(t, op):
    space = space_of(op, ("global", "shared", "param", "local", "const"))
    targets, bits = as_list(op.operands[0]), bits_of(op.type)
    if space == "param":
        name, offset = split_address(op.operands[1])
        for j, target in enumerate(targets):
            t.write(target, f"M.memory.parameter({name!r},{offset + j * bits // 8},{bits})", op.type)
        return
    space = "global" if space == "const" else space
    address = t.address(op.operands[1])
    t.emit(f"t=M.memory.load({space!r},{bits},{op.vector},{address},{op.mask},{op.line})")
    if op.has("acquire") and space in ("global", "generic"):
        t.emit(f"M.memory.sync_flag({address},{op.mask},False)")
    for j, target in enumerate(targets):
        t.write(target, f"t[{j}]", op.type)


@opcode("st")
def store(t, op):
    space = space_of(op, ("global", "shared", "param", "local"))
    if space == "param":
        return
    address, bits = t.address(op.operands[0]), bits_of(op.type)
    if op.has("release") and space in ("global", "generic"):
        t.emit(f"M.memory.sync_flag({address},{op.mask},True)")
    values = ",".join(t.read(x, f"b{bits}") for x in as_list(op.operands[1]))
    t.emit(f"M.memory.store({space!r},{bits},{address},[{values}],{op.mask},{op.line})")


@opcode("atom", "red")
def atomic(t, op):
    space = "shared" if any(m.startswith("shared") for m in op.modifiers) else "global"
    function = op.first("add min max and or xor exch cas inc dec".split())
    order, bits = op.first(("acquire", "release", "acq_rel"), ""), bits_of(op.type)
    target, *operands = op.operands if op.root == "atom" else ["_", *op.operands]
    values = as_list(operands[1])
    targets = target if isinstance(target, list) else [target] * len(values)
    address = t.address(operands[0])
    for j, (register, value) in enumerate(zip(targets, values, strict=True)):
        where = f"({address}.astype(np.int64)+{j * bits // 8})" if j else address
        compare = "None"
        value = t.read(value, f"b{bits}")
        if function == "cas":  # atom.cas d, [a], compare, new
            compare = t.read(operands[2], f"b{bits}")
        arguments = f"{space!r},{function!r},{op.type!r},{where},{value},{compare},{op.mask},{op.line},{order!r}"
        t.emit(f"t=M.memory.atomic({arguments})")
        if register != "_":
            t.write(register, "t", f"b{bits}")


@opcode("cp")
def copy_async(t, op):
    if op.modifiers[0] != "async":
        raise op.unsupported()
    if op.has("commit_group"):
        t.emit(f"M.memory.copy_commit({op.mask})")
    elif op.has("wait_group"):
        t.emit(f"M.memory.copy_wait({int(op.operands[0])},{op.mask})")
    elif op.has("wait_all"):
        t.emit(f"M.memory.copy_wait(None,{op.mask})")
    elif op.modifiers[1] in ("ca", "cg"):
        target, source, size, *rest = op.operands
        source_size = t.read(rest[0], "b32") if rest and _is_word(t, rest[0]) else "None"  # else: a cache policy
        addresses = f"{t.address(target)},{t.address(source)}"
        t.emit(f"M.memory.copy_async({int(size, 0)},{addresses},{source_size},{op.mask},{op.line})")
    else:
        raise op.unsupported()


def _is_word(t, operand):
    register = t.kernel.registers.get(operand)
    return register.bits == 32 if register else re.match(r"^(0x)?[0-9a-fA-F]+$", operand)


@opcode("cvta", "mapa")
def same_address(t, op):
    """Address spaces do not overlap, so converting an address keeps it."""
    t.write(op.operands[0], t.read(op.operands[1], "b64"), "b64")


@opcode("createpolicy")
def cache_policy(t, op):
    t.write(op.operands[0], t.constant(np.uint64(0)), "b64")


# ---- warps


@opcode("shfl")
def shuffle(t, op):
    target, _, predicate = op.operands[0].partition("|")
    value, offset, clamp = (t.read(x, "b32") for x in op.operands[1:4])
    t.emit(f"t,tp=M.warps.shuffle({op.modifiers[1]!r},{value},{offset},{clamp},{op.mask},{op.line})")
    t.write(target, "t", "b32")
    if predicate:
        t.write(predicate, "tp", "pred")


@opcode("vote")
def vote(t, op):
    mode = op.modifiers[1]
    t.emit(f"t=M.warps.vote({mode!r},{t.read(op.operands[1], 'pred')},{op.mask})")
    t.write(op.operands[0], "t", "b32" if mode == "ballot" else "pred")


@opcode("activemask")
def active_mask(t, op):
    t.emit(f"t=M.warps.vote('ballot',np.bool_(True),{op.mask})")
    t.write(op.operands[0], "t", "b32")


@opcode("redux")
def reduce(t, op):
    t.emit(f"t=M.warps.reduce({op.modifiers[1]!r},{op.type!r},{t.read(op.operands[1], 'b32')},{op.mask})")
    t.write(op.operands[0], "t", "b32")


@opcode("elect")
def elect(t, op):
    target, _, predicate = op.operands[0].partition("|")
    t.write(predicate, "(M.batch.lane==0)", "pred")
    t.write(target, t.constant(np.uint32(0)), "b32")


@opcode("ldmatrix")
def load_matrix(t, op):
    if op.type != "b16" or not op.has("m8n8"):
        raise op.unsupported()
    targets = as_list(op.operands[0])
    address = t.address(op.operands[1])
    t.emit(f"t=M.warps.load_matrices({len(targets)},{op.has('trans')},{address},{op.mask},{op.line})")
    for j, target in enumerate(targets):
        t.write(target, f"t[{j}]", "b32")


@opcode("stmatrix")
def store_matrix(t, op):
    if op.type != "b16" or not op.has("m8n8"):
        raise op.unsupported()
    values = _registers(t, op.operands[1], "b32")
    t.emit(f"M.warps.store_matrices({op.has('trans')},{t.address(op.operands[0])},{values},{op.mask},{op.line})")


def _registers(t, operands, type_name):
    return f"[{','.join(t.read(x, type_name) for x in as_list(operands))}]"


@opcode("mma")
def mma(t, op):
    if op.modifiers[0] != "sync" or not op.has("row") or op.has("sp"):
        raise op.unsupported()
    shape = next(m for m in op.modifiers if re.match(r"m\d+n\d+k\d+", m))
    d_type, *types = op.modifiers[-4:]

    def word(type_name):
        return "b64" if type_name == "f64" else "b32"

    inputs = ",".join(_registers(t, x, word(ty)) for x, ty in zip(op.operands[1:4], types, strict=True))
    t.emit(f"t=M.warps.mma({shape!r},{','.join(map(repr, types))},{inputs},{op.mask},{op.line})")
    for j, target in enumerate(as_list(op.operands[0])):
        t.write(target, f"t[{j}]", word(d_type))


@opcode("wgmma")
def wgmma(t, op):
    kind = op.modifiers[0]
    if kind == "fence":
        return
    if kind == "commit_group":
        t.emit("M.warps.wgmma_commit()")
        return
    if kind == "wait_group":
        t.emit(f"M.warps.wgmma_wait({int(op.operands[0])})")
        return
    if kind != "mma_async" or op.modifiers[1:3] != ["sync", "aligned"] or len(op.modifiers) != 7:
        raise op.unsupported()
    shape, *types = op.modifiers[3:]
    if not shape.startswith("m64n"):
        raise op.unsupported()
    d, a, b, keep, *flags = op.operands
    in_registers = isinstance(a, list)
    scale_a, scale_b, *transposed = [int(x) for x in flags] or [1, 1]
    if in_registers:
        transposed = [0, *transposed[:1]]  # A in registers has no transpose flag
    a_trans, b_trans = transposed if len(transposed) == 2 else (0, 0)
    a = _registers(t, a, "b32") if in_registers else t.read(a, "b64")
    operands = f"{_registers(t, d, 'b32')},{a},{t.read(b, 'b64')},{t.read(keep, 'pred')}"
    modes = f"{scale_a},{scale_b},{a_trans},{b_trans}"
    t.emit(f"t=M.warps.wgmma({shape!r},{','.join(map(repr, types))},{operands},{modes},{op.mask},{op.line})")
    for j, target in enumerate(d):
        t.write(target, f"t[{j}]", "b32")
