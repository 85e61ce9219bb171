"""Arithmetic in Triton's interpreter as a GPU does it: correct bfloat16, and matrix products in one order.

The interpreter keeps bfloat16 as uint16 and computes on the bits as if they were integers: sums, products,
comparisons, reductions and tl.dot are garbage, and a cast from float32 truncates. Here every floating-point operation
on bfloat16 is computed in float32 and rounded once, to nearest even, as PTX does. Loads, stores, selects, bitcasts
and abs only move bits and are right already. Float atomics on bfloat16 keep raising: no kernel of ours has any.

A product of float32 operands is a loop of fmas over K on a GPU, the same wherever an element stands. NumPy's BLAS takes
another order for other shapes and, on some processors, for other places in a block.
"""

import functools

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from heiretsu.kernels.versions import give_interpreter_bfloat16_constants

FLOATS = {tl.bfloat16, tl.float16, tl.float32, tl.float64}


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The numbers that bfloat16 bits (uint16) stand for."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bits(numbers: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to bfloat16, nearest even, as uint16 bits."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)  # a NaN could round up to infinity or wrap around


def is_bfloat16(handle) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def widen(handle):
    """A bfloat16 handle as float32; anything else as it is."""
    return TensorHandle(to_float32(handle.data), tl.float32) if is_bfloat16(handle) else handle


def narrow(handle):
    """A float32 handle as bfloat16; anything else, as the bool of a comparison, as it is."""
    return TensorHandle(to_bits(handle.data), tl.bfloat16) if handle.data.dtype == np.float32 else handle


def install() -> None:
    """Patch the interpreter's builder, reductions and scans; a second call does nothing."""
    if hasattr(InterpreterBuilder.create_dot, "__wrapped__"):
        return
    for name in ("binary_op", "unary_op", "create_fma", "create_clampf", "create_rsqrt", "create_erf"):
        _patch(InterpreterBuilder, name, _through_float32)
    _patch(InterpreterBuilder, "create_dot", _dot)
    _patch(InterpreterBuilder, "cast_impl", _cast)  # create_fp_trunc and the other casts call it
    _patch(InterpreterBuilder, "create_fp_to_fp", _cast_with_rounding)
    give_interpreter_bfloat16_constants(lambda value: TensorHandle(to_bits(np.array([value])), tl.bfloat16))
    # Reductions and scans with a combine function of Triton's own do not go through the builder.
    for owner, names in ((interpreter.ReduceOps, ("sum", "min_max")), (interpreter.ScanOps, ("cumsum", "cumprod"))):
        for name in names:
            _patch(owner, name, _reduction)


def _patch(owner, name, make):
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


def _through_float32(operation):
    def mended(self, *args, **kwargs):
        if not any(map(is_bfloat16, args)):
            return operation(self, *args, **kwargs)
        return narrow(operation(self, *map(widen, args), **kwargs))

    return mended


def _dot(dot):
    """Products of 16 bits are exact in float32 and sums accumulate in it; only an accumulator that is itself bfloat16
    is rounded."""

    def mended(self, a, b, accumulator, *args):
        if a.dtype.scalar in (tl.float32, tl.float64) and a.data.ndim == 2:
            rows, columns = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data.T)  # einsum's order: along memory
            return TensorHandle(np.einsum("mk,nk->mn", rows, columns) + accumulator.data, accumulator.dtype.scalar)
        result = dot(self, widen(a), widen(b), widen(accumulator), *args)
        return narrow(result) if is_bfloat16(accumulator) else result

    return mended


def _cast(cast):
    def mended(self, source, target_type):
        target = target_type.scalar
        if target == tl.bfloat16:
            return source if is_bfloat16(source) else TensorHandle(to_bits(source.data), tl.bfloat16)
        return cast(self, widen(source), target_type)

    return mended


def _cast_with_rounding(cast):
    def mended(self, source, target_type, rounding):
        pair = {source.dtype.scalar, target_type.scalar}
        if tl.bfloat16 in pair and pair <= FLOATS and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(source, target_type)
        return cast(self, source, target_type, rounding)

    return mended


def _reduction(reduce):
    """For methods whose first argument and result are tensors, lists or tuples of tensors."""

    def mended(self, tensor, *args, **kwargs):
        first = tensor[0] if isinstance(tensor, tuple) else tensor
        if not is_bfloat16(first.handle):
            return reduce(self, tensor, *args, **kwargs)
        wide = tl.core.tensor(widen(first.handle), tl.block_type(tl.float32, list(first.shape)))
        return _narrow_tensors(reduce(self, wide, *args, **kwargs))

    return mended


def _narrow_tensors(result):
    if isinstance(result, (list, tuple)):
        return type(result)(map(_narrow_tensors, result))
    if result.dtype.scalar != tl.float32:  # an index
        return result
    block = tl.block_type(tl.bfloat16, list(result.shape)) if result.type.is_block() else tl.bfloat16
    return tl.core.tensor(narrow(result.handle), block)
