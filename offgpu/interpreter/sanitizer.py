"""A sanitizer for kernels in Triton's interpreter: what is wrong with their memory accesses, however right the result.

    with sanitize(order="random", seed=1):
        kernel[grid](...)

OutOfBounds: a lane touches memory outside the logical elements of the launch's tensor arguments (the gaps of a
strided view are outside), or not at an element's start. UnwrittenRead: a lane reads what `scratch.poison_` left
there. Race: two programs touch one element, and at least one of them with a plain store (a GPU runs them in any
order, or at once); or two lanes of one store hit one element. `order` ("forward", "reverse", "random") is the order
in which programs run: results that differ between orders depend on it, as float atomics do, which are no race.

Each error names the program, the source line of the kernel and the argument. Not seen: accesses to another argument
of the same launch by a stray offset (parity sees it), races inside a program, and all that comes with compilation. A
lock, or a last program that sums what others wrote, is reported as a race: programs count as unordered.
"""

import contextlib
import functools
import math
import os
import random
import sys

import numpy as np
import torch
import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from heiretsu.offgpu.scratch import PATTERN

ORDERS = ("forward", "reverse", "random")
NOBODY, SEVERAL = -1, -2  # beside program numbers
NOT_THE_KERNEL = (__file__, os.path.dirname(triton.__file__) + os.sep)


class SanitizerError(AssertionError):
    """A memory access that must not be; the interpreter hands it on as the __cause__ of an InterpreterError."""


class OutOfBounds(SanitizerError):
    pass


class UnwrittenRead(SanitizerError):
    pass


class Race(SanitizerError):
    pass


@contextlib.contextmanager
def sanitize(order: str = "forward", seed: int = 0):
    """Inside, kernels that run in the interpreter are watched, and their programs run in `order`."""
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is none of {ORDERS}")
    watch = _Watch(order, random.Random(seed))
    builder = interpreter.interpreter_builder
    replaced = [
        (InterpreterBuilder, "create_masked_load", watch.load),
        (InterpreterBuilder, "create_masked_store", watch.store),
        (InterpreterBuilder, "create_atomic_rmw", watch.atomic_rmw),
        (InterpreterBuilder, "create_atomic_cas", watch.atomic_cas),
        (GridExecutor, "_init_args_hst", watch.start_launch),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for (owner, name, original), (_, _, method) in zip(originals, replaced, strict=True):
        setattr(owner, name, _instead_of(original, method))
    builder.set_grid_dim, builder.set_grid_idx = watch.set_grid_dim, watch.set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
        for owner, name, original in originals:
            setattr(owner, name, original)


def _instead_of(original, method):
    """A method of the interpreter that calls `method` with the original, bound, as its first argument."""
    return lambda self, *args, **kwargs: method(functools.partial(original, self), *args, **kwargs)


class _Memory:
    """One storage that the launch may touch, and who has touched each unit of it.

    A unit is as large as the smallest element of any argument on this storage.
    """

    def __init__(self, tensors):
        self.tensors = tensors  # [(argument's name, tensor)]
        storage = tensors[0][1].untyped_storage()
        self.start, num_bytes = storage.data_ptr(), storage.nbytes()
        self.end = self.start + num_bytes
        self.unit = math.gcd(*(tensor.element_size() for _, tensor in tensors))
        self.inside = np.zeros(-(-num_bytes // self.unit), bool)
        for _, tensor in tensors:
            self.inside[_units(tensor, self.unit)] = True
        self.writer, self.reader, self.atomic = (np.full(self.inside.size, NOBODY, np.int32) for _ in range(3))

    def locate(self, addresses, width):
        """Units (lanes, units an element) that accesses of `width` bytes touch, and which lanes are outside."""
        offset = addresses - self.start
        units = offset[:, None] // self.unit + np.arange(max(1, width // self.unit))
        known = (units >= 0) & (units < self.inside.size)
        allowed = known & self.inside[np.where(known, units, 0)]
        return units, ~allowed.all(1) | (offset % min(width, self.unit) != 0)

    def describe(self, address):
        name, tensor = self.tensors[0]
        where = (address - tensor.data_ptr()) / tensor.element_size()
        names = ", ".join(name for name, _ in self.tensors)
        return (
            f"element {where:g} of {names} ({str(tensor.dtype)[6:]}, {tuple(tensor.shape)}, strides {tensor.stride()})"
        )


def _units(tensor, unit):
    """Unit indices, within the storage, of every element of a tensor."""
    elements = np.full(1, tensor.storage_offset() if tensor.numel() else 0, np.int64)
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements = (elements[:, None] + np.arange(n if stride or not n else 1, dtype=np.int64) * stride).reshape(-1)
    per_element = tensor.element_size() // unit
    return (elements[:, None] * per_element + np.arange(per_element)).reshape(-1)


class _Watch:
    """Checks every access of the running launch, and gives its programs their order."""

    def __init__(self, order, generator):
        self.order, self.generator = order, generator
        self.memories = []

    # Launches

    def start_launch(self, original, args, kwargs):
        args_host, kwargs_host = original(args, kwargs)
        storages: dict = {}
        (executor,) = original.args
        for name, tensor in _tensors([*zip(executor.arg_names, args_host, strict=False), *kwargs_host.items()]):
            if tensor.numel():
                storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self.memories = [_Memory(tensors) for tensors in storages.values()]
        return args_host, kwargs_host

    def set_grid_dim(self, *dims):
        InterpreterBuilder.set_grid_dim(interpreter.interpreter_builder, *dims)
        self.dims, self.programs = dims, list(range(math.prod(dims)))
        if self.order == "reverse":
            self.programs.reverse()
        elif self.order == "random":
            self.generator.shuffle(self.programs)

    def set_grid_idx(self, x, y, z):
        """The interpreter counts up; the program that runs is the one at that place of the order."""
        _, ny, nz = self.dims
        self.program = self.programs[(x * ny + y) * nz + z]
        index = (self.program // (ny * nz), self.program // nz % ny, self.program % nz)
        InterpreterBuilder.set_grid_idx(interpreter.interpreter_builder, *index)

    # Accesses

    def load(self, original, pointers, mask, *args, **kwargs):
        accesses = list(self._locate("load", pointers, mask))
        for memory, units in accesses:
            self._conflict("reads", "another program wrote", memory, units, memory.writer, memory.atomic)
            reader = memory.reader[units]
            memory.reader[units] = np.where((reader == NOBODY) | (reader == self.program), self.program, SEVERAL)
        result = original(pointers, mask, *args, **kwargs)
        self._find_unwritten(result.data, pointers, mask)
        return result

    def store(self, original, pointers, value, mask, *args, **kwargs):
        for memory, units in self._locate("store", pointers, mask):
            self._conflict("overwrites", "another program wrote", memory, units, memory.writer, memory.atomic)
            self._conflict("overwrites", "another program read", memory, units, memory.reader)
            memory.writer[units] = self.program
            if np.unique(units).size != units.size:
                raise Race(f"{self._here()}: several lanes of one store write the same element")
        return original(pointers, value, mask, *args, **kwargs)

    def atomic_rmw(self, original, operation, pointers, value, mask, *args, **kwargs):
        self._atomic(pointers, mask)
        result = original(operation, pointers, value, mask, *args, **kwargs)
        self._find_unwritten(result.data, pointers, mask)
        return result

    def atomic_cas(self, original, pointers, *args, **kwargs):
        self._atomic(pointers, np.ones(pointers.data.shape, bool))
        return original(pointers, *args, **kwargs)

    def _atomic(self, pointers, mask):
        for memory, units in self._locate("atomic", pointers, mask):
            self._conflict(
                "updates", "another program wrote or read plainly", memory, units, memory.writer, memory.reader
            )
            atomic = memory.atomic[units]
            memory.atomic[units] = np.where((atomic == NOBODY) | (atomic == self.program), self.program, SEVERAL)

    def _locate(self, kind, pointers, mask):
        """Yield (memory, units) for each memory that the active lanes touch; raise OutOfBounds."""
        addresses = pointers.data.astype(np.int64)[_active(pointers, mask)]
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if not addresses.size:
            return
        for memory, here in self._by_memory(addresses):
            units, bad = memory.locate(here, width)
            if bad.any():
                first = int(here[bad][0])
                raise OutOfBounds(
                    f"{self._here()}: {kind} of {int(bad.sum())} of {addresses.size} lanes outside every argument; the "
                    f"first at {memory.describe(first)}"
                )
            yield memory, units

    def _by_memory(self, addresses):
        """Split addresses by the memory that each lies in, or that begins next below it."""
        low, high = addresses.min(), addresses.max()
        for memory in self.memories:
            if memory.start <= low and high < memory.end:
                return [(memory, addresses)]
        if not self.memories:
            raise OutOfBounds(f"{self._here()}: memory access in a launch without tensor arguments")
        distance = addresses[:, None] - np.array([memory.start for memory in self.memories])
        nearest = np.where(distance >= 0, distance, np.iinfo(np.int64).max).argmin(1)
        return [(self.memories[i], addresses[nearest == i]) for i in np.unique(nearest)]

    def _conflict(self, does, what, memory, units, *owners):
        for owner in owners:
            others = (owner[units] != NOBODY) & (owner[units] != self.program)
            if others.any():
                address = memory.start + int(units[others][0]) * memory.unit
                raise Race(f"{self._here()}: {does} what {what}: {memory.describe(address)}")

    def _find_unwritten(self, data, pointers, mask):
        size = data.dtype.itemsize
        if size == 1:  # no pattern to know it by
            return
        unwritten = (np.ascontiguousarray(data).view(f"i{size}") == PATTERN[size]) & _active(pointers, mask)
        if unwritten.any():
            addresses = np.broadcast_to(pointers.data, unwritten.shape)[unwritten].astype(np.int64)
            address = int(addresses[0])
            ((memory, _), *_) = self._by_memory(addresses[:1])
            raise UnwrittenRead(
                f"{self._here()}: reads {int(unwritten.sum())} elements that nobody has written; the first is "
                f"{memory.describe(address)}"
            )

    def _here(self):
        """Source line (of the innermost frame that is neither Triton's nor of this file) and program."""
        frame = sys._getframe()
        while frame.f_code.co_filename.startswith(NOT_THE_KERNEL):
            frame = frame.f_back
        index = interpreter.interpreter_builder.grid_idx
        return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}: program {index}"


def _active(pointers, mask):
    mask = mask if isinstance(mask, np.ndarray) else mask.data
    return np.broadcast_to(mask, pointers.data.shape).astype(bool)


def _tensors(named):
    """Tensors among launch arguments, also inside tuples and tensor descriptors."""
    for name, value in named:
        if isinstance(value, (tuple, list)):
            yield from _tensors([(name, item) for item in value])
        elif isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(getattr(value, "base", None), torch.Tensor):
            yield name, value.base
