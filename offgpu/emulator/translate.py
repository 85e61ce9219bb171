"""PTX block -> Python function over lanes.

`translate(kernel, block, masked)` writes one Python statement or so for each instruction and compiles them:

    def block(R, M, m):            # R: registers, M: the machine, m: mask of active lanes (None if not masked)
     R[7]=(R[5].view(np.int32)+R[6].view(np.int32)).view(np.uint32)
     t=M.memory.load('global',32,4,R[9],m,k3)
     ...
     return ('bra', 4, R[2])       # or ('exit', lanes), ('bar', id, count), None: fall into the next block

Registers hold unsigned arrays over lanes, or a scalar while all lanes agree. One handler for each opcode is in
operations.py (data, memory, warps, control) and arithmetic.py, registered under the opcode's first word.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from heiretsu.offgpu.emulator import numerics
from heiretsu.offgpu.emulator.batch import SPECIAL
from heiretsu.offgpu.emulator.numerics import FLOAT, SIGNED, UNSIGNED
from heiretsu.offgpu.emulator.parser import Instruction, Kernel, bits_of
from heiretsu.offgpu.emulator.report import Unsupported

# Every modifier that is understood or may be ignored (caching hints, scopes); any other one stops the run.
MODIFIERS = set(
    """global shared local param const nc ca cg cs lu cv wb wt relaxed acquire release acq_rel volatile weak cta gpu
    sys cluster sync aligned async commit_group wait_group wait_all v2 v4 v8 row col trans x1 x2 x4 m8n8 lo hi wide
    rn rz rni rzi rmi rpi rna ftz approx full sat NaN relu noftz uni to entry satfinite eq ne lt le gt ge ls hs equ neu
    ltu leu gtu geu num nan and or xor add min max exch cas inc dec l r wrap clamp bfly idx up down ballot any all warp
    fractional proxy pred b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 f16 bf16 f32 f64 tf32 f16x2 bf16x2 f32x2 e4m3
    e5m2 b128 range sc acquire::gpu L2 L1 xorsign abs""".split()
)
MODIFIER_FAMILIES = ("L1::", "L2::", "shared::cta", "m16n8k", "m8n8k", "m64n")
ANY_MODIFIER = set("fence membar createpolicy griddepcontrol prefetch bra call cvta nanosleep wgmma".split())

HANDLERS: dict[str, Callable] = {}


def opcode(*roots):
    """Register a handler `f(translator, operation)` for opcodes that start with these words."""

    def register(handler):
        HANDLERS.update(dict.fromkeys(roots, handler))
        return handler

    return register


def dtype_of(type_name):
    """NumPy type of a PTX type: signed for s.., float for f16, f32, f64, else unsigned (bf16 and pairs too)."""
    bits = bits_of(type_name)
    if re.fullmatch(r"f(16|32|64)", type_name):
        return FLOAT[bits]
    return SIGNED[bits] if type_name[0] == "s" else UNSIGNED[bits]


@dataclass
class Operation:
    """An instruction, taken apart."""

    opcode: str
    operands: list
    line: str  # name of the constant that holds the source line
    guard: str | None  # predicate expression of a guarded instruction
    mask: str  # expression of the active lanes, "None" for all

    def __post_init__(self):
        self.root, *self.modifiers = self.opcode.split(".")
        self.type = self.modifiers[-1] if self.modifiers else self.root

    def has(self, modifier):
        return modifier in self.modifiers

    def first(self, choices, default=None):
        return next((m for m in self.modifiers if m in choices), default)

    @property
    def vector(self):
        """Elements of a .v2/.v4/.v8 access."""
        return next((int(m[1:]) for m in self.modifiers if re.fullmatch(r"v[248]", m)), 1)

    def unsupported(self):
        return Unsupported(f"{self.opcode} {self.operands}")


class Translator:
    """Python source of one block."""

    def __init__(self, kernel: Kernel, masked: bool):
        self.kernel, self.masked = kernel, masked
        self.source: list[str] = []
        self.constants: dict[str, object] = {}

    def emit(self, statement):
        self.source.append(" " + statement)

    def constant(self, value):
        name = f"k{len(self.constants)}"
        self.constants[name] = value
        return name

    def instruction(self, instruction: Instruction):
        guard, code, operands, line = instruction
        op = Operation(code, operands, self.constant(line), None, "m" if self.masked else "None")
        known = all(m in MODIFIERS or m.startswith(MODIFIER_FAMILIES) for m in op.modifiers)
        if op.root not in HANDLERS or not (known or op.root in ANY_MODIFIER):
            raise op.unsupported()
        if guard:
            negated, register = guard
            predicate = self.read(register, "pred")
            op.guard = f"(~{predicate})" if negated else predicate
            if op.root not in ("bra", "ret", "exit"):
                self.emit(f"q=m&{op.guard}" if self.masked else f"q=np.broadcast_to({op.guard},M.batch.num_lanes)")
                op.mask = "q"
        self.mask = op.mask
        HANDLERS[op.root](self, op)

    # ---- operands

    def read(self, operand, type_name) -> str:
        """Expression of an operand as a type: narrowed, widened (sign-extended if signed) or viewed as it says."""
        if type_name == "pred":
            if operand.startswith("!"):
                return f"(~{self.read(operand[1:], type_name)})"
            if operand in ("0", "1", "-1"):
                return self.constant(np.bool_(operand != "0"))
        register, dtype = self.kernel.registers.get(operand), dtype_of(type_name)
        if register is None:
            return self._literal(operand, dtype)
        bits, kind, value = bits_of(type_name), np.dtype(dtype).kind, f"R[{register.number}]"
        if register.bits < bits:
            if kind == "i":
                return f"{value}.view(np.int{register.bits}).astype(np.int{bits})"
            value = f"{value}.astype(np.uint{bits})"
        elif register.bits > bits:
            value = f"{value}.astype(np.uint{bits})"
        return value if kind in "ub" else f"{value}.view(np.{np.dtype(dtype)})"

    def _literal(self, operand, dtype) -> str:
        """Special register, symbol, float (0f.., 0d..) or integer."""
        unsigned = UNSIGNED[1 if dtype is np.bool_ else np.dtype(dtype).itemsize * 8]
        is_float = np.dtype(dtype).kind == "f"
        if operand in SPECIAL:
            value = f"M.batch.special[{operand!r}]"
            return value if dtype is np.uint32 else f"{value}.astype(np.{np.dtype(dtype)})"
        symbol = re.match(r"([A-Za-z_$][\w$]*)([+-]\d+)?$", operand)
        if symbol and self._is_symbol(symbol.group(1)):
            return f"np.{np.dtype(unsigned)}(M.memory.symbols[{symbol.group(1)!r}]+{int(symbol.group(2) or 0)})"
        if operand[:2] in ("0f", "0F"):
            value = np.uint32(int(operand[2:], 16))
            return self.constant(value.view(np.float32) if is_float else unsigned(value))
        if operand[:2] in ("0d", "0D"):
            value = np.uint64(int(operand[2:], 16))
            return self.constant(dtype(value.view(np.float64)) if is_float else value)
        if operand == "_":
            return self.constant(dtype(0))
        based = operand.lstrip("-")[:2].lower() in ("0x", "0b")
        number = int(operand.rstrip("U"), 0 if based else 10)
        if dtype is np.bool_:
            return self.constant(np.bool_(number & 1))
        return self.constant(unsigned(number & (1 << unsigned(0).itemsize * 8) - 1).view(dtype))

    def _is_symbol(self, name):
        return name in self.kernel.shared or name in self.kernel.constants or name in self.kernel.local

    def write(self, register, value, type_name, mask=None):
        """Assign an expression of a type to a register, in the active lanes."""
        if register == "_":
            return
        index, width = self.kernel.registers[register]
        bits = bits_of(type_name)
        if bits != 1 and width != 1:
            if bits == width:
                value = f"np.asarray({value}).view(np.uint{width})[()]"
            elif bits < width and type_name[0] == "s":
                value = f"np.asarray({value}).view(np.int{bits}).astype(np.int{width}).view(np.uint{width})"
            else:
                value = f"np.asarray({value}).view(np.uint{bits}).astype(np.uint{width})"
        mask = mask or self.mask
        self.emit(f"R[{index}]={value}" if mask == "None" else f"R[{index}]=np.where({mask},{value},R[{index}])")

    def address(self, operand) -> str:
        """Expression of "[base+offset]"; a lane-wise base is unsigned, with an offset signed 64-bit."""
        base, offset = split_address(operand)
        register = self.kernel.registers.get(base)
        if register is not None:
            value = f"R[{register.number}]"
            return f"({value}.astype(np.int64)+{self.constant(np.int64(offset))})" if offset else value
        if self._is_symbol(base):
            return f"np.int64(M.memory.symbols[{base!r}]+{offset})"
        return self.constant(np.int64(int(base) + offset))


def split_address(operand):
    """ "[%rd1+16]" -> ("%rd1", 16)"""
    m = re.match(r"\[\s*([%\w$@.]+)\s*(?:\+\s*(-?\d+)|(-\d+))?\s*\]$", operand)
    return m.group(1), int(m.group(2) or m.group(3) or 0)


def as_list(operand) -> list:
    return operand if isinstance(operand, list) else [operand]


def translate(kernel: Kernel, block: int, masked: bool):
    """The function of a block, made once for each kernel."""
    key = (block, masked)
    if key not in kernel.code:
        translator = Translator(kernel, masked)
        for instruction in kernel.blocks[block]:
            try:
                translator.instruction(instruction)
            except Unsupported:
                raise
            except Exception as error:
                text = f"{instruction.opcode} {instruction.operands} ({type(error).__name__}: {error})"
                raise Unsupported(text) from error
        source = "\n".join(["def block(R,M,m):", *translator.source, " return None"])
        names = {**vars(numerics), **translator.constants}
        exec(compile(source, f"<ptx block {block} of {kernel.name}>", "exec"), names)
        kernel.code[key] = names["block"]
    return kernel.code[key]
