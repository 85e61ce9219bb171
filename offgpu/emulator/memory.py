"""Global, shared and local memory of a launch: layout, address checks, loads, stores, atomics and cp.async.

Every storage behind a tensor argument is copied into one flat global memory, with guard bytes between, and copied
back at the end. An address that is no element of an argument (in a gap between rows, say), or that is no multiple of
the access width, is a finding that stops the run.
"""

import ctypes
import re
import struct

import numpy as np
import torch

from heiretsu.offgpu.emulator import numerics
from heiretsu.offgpu.emulator.numerics import UNSIGNED
from heiretsu.offgpu.emulator.parser import Kernel, bits_of
from heiretsu.offgpu.emulator.races import GlobalRaces, SharedRaces
from heiretsu.offgpu.emulator.report import PTXError

GLOBAL_BASE = 1 << 32  # address of byte 0 of global memory: shared and local addresses stay below
GUARD = 1 << 16
POISON = 0xFF  # bytes of shared memory nobody wrote: NaN as a float of any width


def storage_bytes(storage) -> np.ndarray:
    """The bytes of a CPU storage, writable."""
    if not storage.nbytes():
        return np.zeros(0, np.uint8)
    return np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


def _bytes_of_elements(tensor) -> np.ndarray:
    """Which bytes of its storage a (strided) tensor covers."""
    size, itemsize = tensor.untyped_storage().nbytes(), tensor.element_size()
    if tensor.is_contiguous() and tensor.numel() * itemsize == size:
        return np.ones(size, np.bool_)
    covered = torch.zeros(size // itemsize, dtype=torch.bool)
    covered.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    result = np.zeros(size, np.bool_)
    result[: size // itemsize * itemsize] = covered.numpy().repeat(itemsize)
    return result


def units(index, bits):
    """Byte index -> index into a view of elements of `bits`."""
    return index >> (bits.bit_length() - 4)


class Memory:
    """Memory of one launch; `start` gives each batch of CTAs fresh shared and local memory."""

    def __init__(
        self, kernel: Kernel, args, shared_bytes: int, num_ctas: int, check: bool, report, rng, shuffle_stores
    ):
        self.kernel, self.num_ctas, self.check, self.report = kernel, num_ctas, check, report
        self.rng, self.shuffle_stores = rng, shuffle_stores
        self.symbols: dict[str, int] = {}
        self._place_shared_and_local(shared_bytes)
        values = self._place_global(args)
        self._pack_parameters(values)
        if check:
            cas16 = any(opcode.startswith("atom") and ".cas." in opcode for opcode in kernel.opcodes)
            granule = _granule(kernel, "global")
            self.global_races = GlobalRaces(self.globals, granule, report, num_ctas, cas16)

    # ---- layout

    def _place_shared_and_local(self, shared_bytes):
        offset = 0
        for name, symbol in sorted(self.kernel.shared.items(), key=lambda item: item[1].num_bytes is None):
            offset = -(-offset // symbol.align) * symbol.align
            self.symbols[name] = offset
            offset += symbol.num_bytes or 0
        self.shared_bytes = max(-(-(offset + shared_bytes) // 128) * 128, 128)
        self.local_bytes = 0
        for name, size in self.kernel.local.items():
            self.symbols[name] = self.local_bytes
            self.local_bytes += -(-size // 16) * 16

    def _place_global(self, args):
        """Lay out storages and constants; returns the arguments with tensors replaced by addresses."""
        self.storages: list[tuple[int, torch.UntypedStorage]] = []
        end, placed, values, constants, tensors = GUARD, {}, [], [], []

        def place(num_bytes, alignment_of):
            nonlocal end
            start = -(-end // 256) * 256 + alignment_of % 256  # as aligned as it is in real memory, no more
            end = start + num_bytes + GUARD
            return start

        for arg in args:
            if not isinstance(arg, torch.Tensor):
                values.append(arg)
                continue
            if arg.device.type != "cpu":
                raise PTXError(f"the emulator takes CPU tensors, not {arg.device.type}")
            storage = arg.untyped_storage()
            if storage.data_ptr() not in placed:
                placed[storage.data_ptr()] = place(storage.nbytes(), storage.data_ptr())
                self.storages.append((placed[storage.data_ptr()], storage))
            start = placed[storage.data_ptr()]
            tensors.append((start, arg))
            values.append(GLOBAL_BASE + start + arg.data_ptr() - storage.data_ptr())
        for name, symbol in self.kernel.constants.items():
            start = place(symbol.num_bytes or symbol.element_bytes, 0)
            self.symbols[name] = GLOBAL_BASE + start
            constants.append((start, symbol))

        size = -(-end // 16) * 16 + 16
        self.globals, self.valid = np.zeros(size, np.uint8), np.zeros(size, np.bool_)
        for start, storage in self.storages:
            self.globals[start : start + storage.nbytes()] = storage_bytes(storage)
        for start, tensor in tensors:
            self.valid[start : start + tensor.untyped_storage().nbytes()] |= _bytes_of_elements(tensor)
        for start, symbol in constants:
            self.valid[start : start + (symbol.num_bytes or symbol.element_bytes)] = True
            data = _initial_bytes(symbol)
            self.globals[start : start + len(data)] = np.frombuffer(data, np.uint8)
        return values

    def _pack_parameters(self, values):
        """The bytes that ld.param reads; parameters beyond the given arguments are zero."""
        values = iter(values)
        self.parameters = {}
        for name, type_name, num_bytes in self.kernel.parameters:
            value = next(values, None)
            self.parameters[name] = _packed(0 if value is None else value, type_name, num_bytes)[: max(num_bytes, 1)]

    def write_back(self):
        for start, storage in self.storages:
            storage_bytes(storage)[:] = self.globals[start : start + storage.nbytes()]

    def start(self, batch):
        self.batch = batch
        self.shared = np.full(batch.num_ctas * self.shared_bytes, POISON, np.uint8)
        self.shared_start = (batch.slot * self.shared_bytes).astype(np.int64)
        self.local = np.zeros(batch.num_lanes * max(self.local_bytes, 1), np.uint8)
        self.copies = []  # cp.async not yet waited for: (lanes, shared index, data, group of each lane, line)
        self.copy_group = np.zeros(batch.num_lanes, np.int64)
        if self.check:
            self.shared_races = SharedRaces(batch, self.shared, _granule(self.kernel, "shared"), self.report)
            self.global_races.start(batch)

    # ---- what the translated code calls: addresses and values are whole or uniform, `mask` may be None

    def parameter(self, name, offset, bits):
        raw = self.parameters.get(name, b"")[offset : offset + bits // 8]
        return UNSIGNED[bits](int.from_bytes(raw.ljust(bits // 8, b"\0"), "little"))

    def load(self, space, bits, count, address, mask, line):
        """`count` registers of `bits` for each lane; inactive lanes get zero."""
        lanes = self.batch.active(mask)
        if not lanes.size:
            return [UNSIGNED[bits](0)] * count
        space, contents, index = self._resolve(space, address, lanes, bits // 8 * count, line)
        if self.check and space != "local":
            races = self.shared_races if space == "shared" else self.global_races
            races.read(index, bits // 8 * count, lanes, self._where(line))
        values = contents.view(UNSIGNED[bits])[units(index, bits)[:, None] + np.arange(count)]
        return [self.batch.spread(values[:, j], lanes) for j in range(count)]

    def store(self, space, bits, address, values, mask, line):
        lanes = self.batch.active(mask)
        if not lanes.size:
            return
        width = bits // 8 * len(values)
        space, contents, index = self._resolve(space, address, lanes, width, line)
        values = np.stack([self.batch.whole(value)[lanes] for value in values], 1)
        if self.check and space != "local":
            races = self.shared_races if space == "shared" else self.global_races
            races.write(index, width, lanes, values, self._where(line))
        if space == "global" and self.shuffle_stores and lanes.size > 32:
            order = self.rng.permutation(lanes.size)
            index, values = index[order], values[order]
        contents.view(UNSIGNED[bits])[units(index, bits)[:, None] + np.arange(values.shape[1])] = values

    def atomic(self, space, op, type_name, address, value, compare, mask, line, order):
        """Read-modify-write, lane by lane in random order; returns the old contents."""
        bits, lanes = bits_of(type_name), self.batch.active(mask)
        old = np.zeros(self.batch.num_lanes, UNSIGNED[bits])
        if not lanes.size:
            return old
        space, contents, index = self._resolve(space, address, lanes, bits // 8, line)
        if self.check and space == "global":
            self.global_races.atomic(index, bits // 8, lanes, self._where(line))
        elif self.check:
            self.shared_races.atomic(index, bits // 8, lanes)
        cells, position = contents.view(UNSIGNED[bits]), units(index, bits)
        value, compare = self.batch.whole(value), None if compare is None else self.batch.whole(compare)
        synchronizes = self.check and space == "global" and order and self.num_ctas > 1
        for j in self.rng.permutation(lanes.size):
            lane, cell = lanes[j], position[j]
            if synchronizes:
                acquire, release = order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
                self.global_races.clocks.sync(int(self.batch.cta[lane]), int(cell), acquire, release)
            old[lane] = cells[cell]
            cells[cell] = numerics.atomic(
                op, type_name, cells[cell], value[lane], None if compare is None else compare[lane]
            )
        return old

    def sync_flag(self, address, mask, release):
        """Ordering of a plain ld.acquire or st.release."""
        if self.check and self.num_ctas > 1:
            address = self.batch.whole(address).astype(np.int64)
            for lane in self.batch.active(mask):
                cell = int(address[lane]) - GLOBAL_BASE >> 2
                self.global_races.clocks.sync(int(self.batch.cta[lane]), cell, not release, release)

    def copy_async(self, size, target, source, source_size, mask, line):
        """cp.async: reads now; shared memory holds poison until the wait. Bytes beyond source_size become zero."""
        lanes = self.batch.active(mask)
        if not lanes.size:
            return
        target = self._index("shared", target, lanes, size, line)
        length = np.full(lanes.size, size)
        if source_size is not None:
            length = np.minimum(self.batch.whole(source_size)[lanes].astype(np.int64), size)
        data = np.zeros((lanes.size, size), np.uint8)
        reading = np.flatnonzero(length > 0)
        if reading.size:
            index = self._index("global", source, lanes[reading], size, line)
            if self.check:
                self.global_races.read(index, size, lanes[reading], self._where(line))
            data[reading] = self.globals[index[:, None] + np.arange(size)]
            data[np.arange(size)[None] >= length[:, None]] = 0
        if self.check:
            self.shared_races.write(target, size, lanes, None, self._where(line), in_flight=True)
        self.shared[target[:, None] + np.arange(size)] = POISON
        self.copies.append((lanes, target, data, self.copy_group[lanes], line))

    def copy_commit(self, mask):
        self.copy_group[self.batch.active(mask)] += 1

    def copy_wait(self, pending, mask):
        """Land the copies of the active lanes but those of the last `pending` groups (None: all)."""
        active, kept = self.batch.mask(mask), []
        for lanes, target, data, group, line in self.copies:
            landing = active[lanes]
            if pending is not None:
                landing = landing & (group < self.copy_group[lanes] - pending)
            if landing.any():
                size, where_to, values = data.shape[1], target[landing], np.ascontiguousarray(data[landing])
                if self.check:
                    self.shared_races.forget_in_flight(where_to, size)
                    self.shared_races.write(where_to, size, lanes[landing], values, self._where(line))
                self.shared[where_to[:, None] + np.arange(size)] = values
            if not landing.all():
                rest = ~landing
                kept.append((lanes[rest], target[rest], data[rest], group[rest], line))
        self.copies = kept

    # ---- addresses

    def _where(self, line):
        return lambda: self.kernel.where(line)

    def _resolve(self, space, address, lanes, width, line):
        """(address space, its bytes, byte index of each lane)."""
        if space == "generic":
            is_local = self.local_bytes and (self.batch.whole(address)[lanes].astype(np.int64) < GLOBAL_BASE).all()
            space = "local" if is_local else "global"
        contents = {"global": self.globals, "shared": self.shared, "local": self.local}[space]
        return space, contents, self._index(space, address, lanes, width, line)

    def _index(self, space, address, lanes, width, line):
        """Byte indices into the space's contents, checked."""
        address = self.batch.whole(address)[lanes].astype(np.int64)
        return self.checked_index(space, address, lanes, width, line)

    def checked_index(self, space, address, lanes, width, line):
        """The same for addresses of the active lanes only."""
        crooked = address & (width - 1)
        if crooked.any():
            text = f"{space} access of {width} bytes: address {int(address[crooked != 0][0]):#x}"
            self.report.add("misaligned", self.kernel.where(line), text)
            raise PTXError(f"misaligned {space} access of {width} bytes at {self.kernel.where(line)}")
        if space == "global":
            index = address - GLOBAL_BASE
            outside = (index < 0) | (index + width > self.globals.size)
            inside = np.where(outside, 0, index)
            outside |= ~self.valid[inside] | ~self.valid[inside + width - 1]
            if outside.any():
                self._out_of_bounds(index[outside], width, line)
            return index
        limit = self.shared_bytes if space == "shared" else self.local_bytes
        if ((address < 0) | (address + width > limit)).any():
            text = f"{space} access out of bounds at {self.kernel.where(line)}: {int(address.max())}+{width} > {limit}"
            raise PTXError(text)
        return address + (self.shared_start[lanes] if space == "shared" else lanes * self.local_bytes)

    def _out_of_bounds(self, indices, width, line):
        index, nearest = int(indices[0]), []
        for number, (start, storage) in enumerate(self.storages):
            size, offset = storage.nbytes(), index - start
            distance = 0 if 0 <= offset < size else min(abs(offset), abs(offset - size + 1))
            inside = "of the storage, but no element, of tensor" if not distance else "of tensor"
            nearest.append((distance, f": byte {offset} {inside} #{number} ({size} bytes)"))
        text = f"global access of {width} bytes outside every tensor" + (min(nearest)[1] if nearest else "")
        self.report.add("oob", self.kernel.where(line), text, len(indices))
        raise PTXError(str(self.report))


def _granule(kernel, space) -> int:
    """Width in bytes of the narrowest access to a space, at most 8: every access covers whole granules."""
    narrowest = 8
    for opcode in kernel.opcodes:
        root, *modifiers = opcode.split(".")
        if root in ("atom", "red"):
            narrowest = min(narrowest, bits_of(modifiers[-1]) // 8)
        if root == "cp" and modifiers[0] == "async" and modifiers[1] in ("ca", "cg"):
            narrowest = min(narrowest, 4)
        if root not in ("ld", "ldu", "st"):
            continue
        if any(
            m.split("::")[0]
            in {"global": ("shared", "local", "param"), "shared": ("global", "local", "param", "const")}[space]
            for m in modifiers
        ):
            continue
        count = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v[248]", m)), 1)
        narrowest = min(narrowest, bits_of(modifiers[-1]) * count // 8)
    return max(narrowest, 1)


def _initial_bytes(symbol) -> bytes:
    """Contents of an initialised constant array."""
    words = [w for w in (symbol.initial or "").split(",") if re.match(r"^-?\w+$", w.strip())]
    modulus = 1 << 8 * symbol.element_bytes
    return b"".join((int(w, 0) % modulus).to_bytes(symbol.element_bytes, "little") for w in words)


def _packed(value, type_name, num_bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    if type_name in ("f32", "f64"):
        return struct.pack("<f" if type_name == "f32" else "<d", float(value))
    if isinstance(value, float):
        return struct.pack("<f" if num_bytes == 4 else "<d", value)
    return struct.pack("<Q", int(value) & ((1 << 64) - 1))
