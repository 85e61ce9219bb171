"""Translation of moves, conversions, comparisons, float and integer arithmetic, and bit operations."""

import re

import numpy as np

from heiretsu.offgpu.emulator.numerics import UNSIGNED
from heiretsu.offgpu.emulator.parser import bits_of
from heiretsu.offgpu.emulator.translate import dtype_of, opcode

COMBINE = {"and": "&", "or": "|", "xor": "^"}
FLOAT_COMPARISONS = set("eq ne lt le gt ge equ neu ltu leu gtu geu num nan".split())
ROUND_TO_INTEGER = {"rzi": "z", "rni": "n", "rmi": "m", "rpi": "p"}
NUMPY_ROUND = {"z": "trunc", "n": "rint", "m": "floor", "p": "ceil"}


def numpy_name(type_name):
    return f"np.{np.dtype(dtype_of(type_name))}"


def is_float(type_name):
    return re.match(r"(f|bf)\d", type_name) is not None


# ---- moves and selection


@opcode("mov")
def move(t, op):
    target, source = op.operands
    bits = bits_of(op.type)
    if isinstance(source, list):  # pack
        part = bits // len(source)
        pieces = [
            f"({t.read(x, f'b{part}')}.astype(np.uint{bits})<<{t.constant(UNSIGNED[bits](part * j))})"
            for j, x in enumerate(source)
        ]
        t.write(target, f"({'|'.join(pieces)})", op.type)
    elif isinstance(target, list):  # unpack
        part = bits // len(target)
        t.emit(f"t={t.read(source, f'b{bits}')}")
        for j, x in enumerate(target):
            t.write(x, f"(t>>{t.constant(UNSIGNED[bits](part * j))}).astype(np.uint{part})", f"b{part}")
    else:
        type_name = "pred" if op.type == "pred" else f"b{bits}"
        t.write(target, t.read(source, type_name), type_name)


@opcode("selp")
def select(t, op):
    target, a, b, predicate = op.operands
    bits = f"b{bits_of(op.type)}"
    t.write(target, f"np.where({t.read(predicate, 'pred')},{t.read(a, bits)},{t.read(b, bits)})", bits)


@opcode("slct")
def select_by_sign(t, op):
    target, a, b, c = op.operands
    bits = f"b{bits_of(op.modifiers[-2])}"
    t.write(target, f"np.where({t.read(c, op.type)}>=0,{t.read(a, bits)},{t.read(b, bits)})", bits)


# ---- comparison


@opcode("setp")
def set_predicate(t, op):
    """setp.lt.and.s32 p|q, a, b, c: p = (a < b) & c, q = ~(a < b) & c; packed halves give p and q from each half."""
    first, _, second = op.operands[0].partition("|")
    combine = op.first(COMBINE)
    with_third = f"{COMBINE[combine]}{t.read(op.operands[3], 'pred')}" if combine else ""
    if op.type.endswith("x2"):
        if op.modifiers[0] not in FLOAT_COMPARISONS:
            raise op.unsupported()
        half = "bf16_to_f32(halves({})[{}])" if op.type == "bf16x2" else "halves({})[{}].view(np.float16)"
        a, b = (t.read(x, "b32") for x in op.operands[1:3])
        results = (f"fcmp({op.modifiers[0]!r},{half.format(a, j)},{half.format(b, j)}){with_third}" for j in (0, 1))
        t.emit(f"t,t2={','.join(results)}")
    else:
        t.emit(f"t={_comparison(t, op)}")
        if second:
            t.emit(f"t2=(~t){with_third}")
        t.emit(f"t=t{with_third}")
    t.write(first, "t", "pred")
    if second:
        t.write(second, "t2", "pred")


@opcode("set")
def set_value(t, op):
    """set.lt.f32.f32: 1.0 or all ones where the comparison holds."""
    if op.type.endswith("x2"):
        raise op.unsupported()
    combine = op.first(COMBINE)
    t.emit(f"t={_comparison(t, op)}")
    if combine:
        t.emit(f"t=(t{COMBINE[combine]}{t.read(op.operands[3], 'pred')})")
    result = op.modifiers[-2]
    true, false = (np.float32(1), np.float32(0)) if result == "f32" else (np.uint32(0xFFFFFFFF), np.uint32(0))
    t.write(op.operands[0], f"np.where(t,{t.constant(true)},{t.constant(false)})", result)


def _comparison(t, op):
    a, b = (_read_float(t, x, op.type) for x in op.operands[1:3])
    return f"{'fcmp' if is_float(op.type) else 'icmp'}({op.modifiers[0]!r},{a},{b})"


def _read_float(t, operand, type_name):
    """An operand as NumPy computes with it; bf16 becomes float32."""
    return f"bf16_to_f32({t.read(operand, 'b16')})" if type_name == "bf16" else t.read(operand, type_name)


# ---- conversion


@opcode("cvt")
def convert(t, op):
    types = [m for m in op.modifiers if re.fullmatch(r"(pred|[busf]\d+|bf16|tf32|e4m3|e5m2|f16)(x2)?", m)]
    to, source = types[0], types[-1]
    if "e" in (to[0], source[0]):
        raise op.unsupported()
    if to in ("f16x2", "bf16x2"):
        _convert_pair(t, op, to, source)
    elif to == "tf32":
        word = t.read(op.operands[1], "b32")
        value = f"(({word}+{t.constant(np.uint32(0x1000))})&{t.constant(np.uint32(0xFFFFE000))})"
        t.write(op.operands[0], value, "b32")
    else:
        mode = next((ROUND_TO_INTEGER[m] for m in op.modifiers if m in ROUND_TO_INTEGER), None)
        value = _read_float(t, op.operands[1], source)
        if to == "bf16":
            t.write(op.operands[0], f"f32_to_bf16({value}.astype(np.float32),{op.has('rz')})", "b16")
        elif to[0] == "f":
            if mode:
                value = f"np.{NUMPY_ROUND[mode]}({value})"
            if op.has("ftz"):
                value = f"ftz(np.asarray({value}))"
            value = f"np.asarray({value}).astype({numpy_name(to)})"
            t.write(op.operands[0], f"np.clip({value},0,1)" if op.has("sat") else value, to)
        elif is_float(source):
            t.write(op.operands[0], f"f2i({value},{numpy_name(to)},{mode or 'z'!r})", to)
        else:
            if op.has("sat"):
                value = f"np.clip({value},np.iinfo({numpy_name(to)}).min,np.iinfo({numpy_name(to)}).max)"
            t.write(op.operands[0], f"{value}.astype({numpy_name(to)})", to)


def _convert_pair(t, op, to, source):
    """cvt.rn.f16x2.f32 d, high, low"""
    if source != "f32":
        raise op.unsupported()

    def half(operand):
        value = t.read(operand, "f32")
        if op.has("relu"):
            value = f"np.maximum({value},np.float32(0))"
        if to == "f16x2":
            return f"{value}.astype(np.float16).view(np.uint16)"
        return f"f32_to_bf16({value},{op.has('rz')})"

    t.write(op.operands[0], f"pack2({half(op.operands[2])},{half(op.operands[1])})", "b32")


# ---- arithmetic on one type: packed floats, floats, integers


@opcode(*"add sub mul div rem mad fma min max neg abs sqrt sin cos ex2 lg2 tanh rcp rsqrt copysign".split())
def arithmetic(t, op):
    if op.type == "f32x2":
        _packed_f32(t, op)
    elif op.type in ("f16x2", "bf16x2"):
        _packed_halves(t, op)
    elif op.type == "bf16":
        t.write(op.operands[0], f"f32_to_bf16({_relu(op, _float(op, _bf16s(t, op)))})", "b16")
    elif is_float(op.type):
        _one_float(t, op)
    else:
        _integer(t, op)


def _bf16s(t, op):
    return [_read_float(t, x, "bf16") for x in op.operands[1:]]


def _relu(op, value):
    return f"np.maximum({value},np.float32(0))" if op.has("relu") else value


def _one_float(t, op):
    values = [t.read(x, op.type) for x in op.operands[1:]]
    if op.type == "f16":
        values = [f"{v}.astype(np.float32)" for v in values]
    if op.has("ftz"):
        values = [f"ftz({v})" for v in values]
    result = _float(op, values)
    if op.has("ftz"):
        result = f"ftz(np.asarray({result}))"
    if op.has("sat"):
        result = f"np.clip(np.nan_to_num({result}),0,1)"
    t.write(op.operands[0], f"np.asarray({result}).astype(np.float16)" if op.type == "f16" else result, op.type)


def _packed_f32(t, op):
    if op.root not in ("add", "sub", "mul", "fma"):
        raise op.unsupported()
    results = []
    for shift in (0, 32):
        values = [
            f"({t.read(x, 'b64')}>>{t.constant(np.uint64(shift))}).astype(np.uint32).view(np.float32)"
            for x in op.operands[1:]
        ]
        results.append(f"np.asarray({_float(op, values)}).view(np.uint32).astype(np.uint64)")
    t.write(op.operands[0], f"({results[0]}|({results[1]}<<{t.constant(np.uint64(32))}))", "b64")


def _packed_halves(t, op):
    bf16 = op.type == "bf16x2"
    results = []
    for j in (0, 1):
        words = [f"halves({t.read(x, 'b32')})[{j}]" for x in op.operands[1:]]
        values = [f"bf16_to_f32({w})" if bf16 else f"{w}.view(np.float16).astype(np.float32)" for w in words]
        result = _relu(op, _float(op, values))
        results.append(f"f32_to_bf16({result})" if bf16 else f"np.asarray({result}).astype(np.float16).view(np.uint16)")
    t.write(op.operands[0], f"pack2({results[0]},{results[1]})", "b32")


FUNCTIONS = dict(abs="abs", sqrt="sqrt", sin="sin", cos="cos", ex2="exp2", lg2="log2", tanh="tanh")
INFIX = dict(add="+", sub="-", mul="*", div="/")


def _float(op, v):
    """Expression of a float operation on float expressions."""
    if op.root in INFIX:
        return f"({v[0]}{INFIX[op.root]}{v[1]})"
    if op.root in ("fma", "mad"):
        return f"fma({v[0]},{v[1]},{v[2]})"
    if op.root in ("min", "max"):
        return _float_extremum(op, v)
    if op.root == "neg":
        return f"(-{v[0]})"
    if op.root == "copysign":
        return f"np.copysign({v[1]},{v[0]})"
    if op.root in FUNCTIONS:
        return f"np.{FUNCTIONS[op.root]}({v[0]})"
    one = "1.0" if op.has("f64") else "np.float32(1)"
    if op.root == "rcp":
        return f"({one}/{v[0]})"
    if op.root == "rsqrt":
        return f"({one}/np.sqrt({v[0]}))"
    raise op.unsupported()


def _float_extremum(op, v):
    """min and max pick the number over a NaN, with .NaN the NaN; .xorsign.abs takes the sign from the product."""
    function = f"np.{op.root}imum" if op.has("NaN") else f"np.f{op.root}"
    if op.has("xorsign"):
        result = f"{function}(np.abs({v[0]}),np.abs({v[1]}))"
        return f"np.where(np.signbit({v[0]})^np.signbit({v[1]}),-{result},{result})"
    if op.has("abs"):
        raise op.unsupported()
    result = f"{function}({v[0]},{v[1]})"
    return f"{function}({result},{v[2]})" if len(v) > 2 else result


def _integer(t, op):
    if "cc" in op.modifiers or (op.root in ("add", "sub") and op.has("sat")):
        raise op.unsupported()
    target, *sources = op.operands
    if op.has("wide"):  # mul.wide, mad.wide: operands of half the width of the result
        wide = f"{op.type[0]}{bits_of(op.type) * 2}"
        a, b = (f"{t.read(x, op.type)}.astype({numpy_name(wide)})" for x in sources[:2])
        value = f"({a}*{b})" if op.root == "mul" else f"({a}*{b}+{t.read(sources[2], wide)})"
        t.write(target, value, wide)
        return
    v = [t.read(x, op.type) for x in sources]
    if op.root in ("mul", "mad"):
        value = f"mulhi({v[0]},{v[1]})" if op.has("hi") else f"({v[0]}*{v[1]})"
        value = f"({value}+{v[2]})" if op.root == "mad" else value
    elif op.root in ("add", "sub"):
        value = f"({v[0]}{INFIX[op.root]}{v[1]})"
    elif op.root in ("min", "max"):
        value = f"np.{op.root}imum({v[0]},{v[1]})"
    elif op.root in ("div", "rem"):
        value = f"i{op.root}({v[0]},{v[1]})"
    elif op.root in ("neg", "abs"):
        value = f"(-{v[0]})" if op.root == "neg" else f"np.abs({v[0]})"
    else:
        raise op.unsupported()
    t.write(target, value, op.type)


# ---- bits


@opcode("and", "or", "xor", "not")
def logic(t, op):
    values = [t.read(x, op.type) for x in op.operands[1:]]
    value = f"(~{values[0]})" if op.root == "not" else f"({values[0]}{COMBINE[op.root]}{values[1]})"
    t.write(op.operands[0], value, op.type)


@opcode("shl", "shr")
def shift(t, op):
    """Amounts beyond the width give 0 (or the sign): as NumPy, once they fit the operand's type."""
    type_name = op.type if op.root == "shr" else f"b{bits_of(op.type)}"
    value, amount = t.read(op.operands[1], type_name), t.read(op.operands[2], "b32")
    amount = f"np.minimum({amount},np.uint32(64)).astype({value}.dtype)"
    t.write(op.operands[0], f"({value}{'<<' if op.root == 'shl' else '>>'}{amount})", type_name)


@opcode("bfe", "bfi", "prmt", "lop3", "popc", "clz", "brev", "shf")
def bit_operation(t, op):
    """Calls of the functions of the same names in numerics.py."""
    target, *x = op.operands
    word = f"b{bits_of(op.type)}"

    def read(*types):
        return ",".join(t.read(operand, type_name) for operand, type_name in zip(x, types, strict=False))

    if op.root == "bfe":
        t.write(target, f"bfe({read(word, 'b32', 'b32')},{op.type[0] == 's'})", word)
    elif op.root == "bfi":
        t.write(target, f"bfi({read(op.type, op.type, 'b32', 'b32')})", op.type)
    elif op.root == "prmt" and len(op.modifiers) == 1:
        t.write(target, f"prmt({read('b32', 'b32', 'b32')})", "b32")
    elif op.root == "lop3":
        t.write(target, f"lop3({read('b32', 'b32', 'b32')},{int(x[3], 0)})", "b32")
    elif op.root in ("popc", "clz"):
        t.write(target, f"{op.root}({read(op.type)})", "b32")
    elif op.root == "brev":
        t.write(target, f"brev({read(op.type)})", op.type)
    elif op.root == "shf":
        t.write(target, f"shf({op.modifiers[0]!r},{read('b32', 'b32', 'b32')},{op.has('clamp')})", "b32")
    else:
        raise op.unsupported()
