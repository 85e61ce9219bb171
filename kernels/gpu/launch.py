"""How a Triton kernel is launched: where it may run, with which tiles, and who is told.

A kernel file opens with its `Tiles`: every launch configuration of it that ships, and why. A launch asks them for its
`Parameters`, computes its grid from these, and goes through `Parameters.launch`, which is where a recording sees it.
"""

import contextlib
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from heiretsu.kernels.control import CONTROL, GPUS
from heiretsu.kernels.recording import Launch
from heiretsu.kernels.versions import triton_interprets, unspecialised

INTERPRETED = triton_interprets()
if INTERPRETED:  # whoever imports a kernel gets it right: without this, bfloat16 trains on garbage
    from heiretsu.kernels.gpu import interpreter_arithmetic, interpreter_launches

    interpreter_arithmetic.install()
    interpreter_launches.install()

Sizes = Mapping[int | None, dict]  # {largest size that it serves: parameters}; None: every size


def tile(block_m: int, block_n: int, num_warps: int, num_stages: int, **more) -> dict:
    """Parameters of a kernel over BLOCK_M x BLOCK_N tiles."""
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages, **more)


def on_every_gpu(sizes: Sizes) -> dict[str, Sizes]:
    return dict.fromkeys(GPUS, sizes)


def accumulator(dtype: torch.dtype):
    """What a kernel's sums of this dtype are taken in: `dtypes.at_least_float32` as a constexpr."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@dataclasses.dataclass(frozen=True)
class Entry:
    """One shipped configuration: of `tiles`, for architecture class `arch`. row: the kernel's name, or that and "/fp32"
    or "/dropout". size: the largest that it serves; None: every size. Equal, and pickled, by these names."""

    tiles: "Tiles" = dataclasses.field(repr=False, compare=False)
    arch: str
    row: str
    size: int | None

    @property
    def parameters(self) -> dict:
        """As shipped: a fresh dict."""
        return dict(self.tiles.rows[self.row][self.arch][self.size])


class Tiles:
    """Every launch configuration of a kernel (or of a few that share one): block sizes, num_warps, num_stages.

    name: the kernel's, of no other tiles. shipped: {architecture class: {largest size: parameters}}; "size" is the dim
    that decides the tile (head dim, hidden size, ...). fp32: for operands of four bytes and more, dropout: for others
    where a mask is drawn; a class that these leave out takes the `shipped` ones. Standing at the head of a file in this
    folder is all that registers them: see `all_tiles`.
    """

    def __init__(self, name: str, shipped: Mapping[str, Sizes], fp32=None, dropout=None):
        self.name = name
        self.rows: dict[str, Mapping[str, Sizes]] = {name: shipped, f"{name}/fp32": fp32 or {}}
        self.rows[f"{name}/dropout"] = dropout or {}

    def __reduce__(self):
        return tiles_named, (self.name,)

    def entries(self, arch: str) -> list[Entry]:
        """All of an architecture class."""
        return [Entry(self, arch, row, size) for row, archs in self.rows.items() for size in archs.get(arch, ())]

    def find(self, arch: str, size: int | None = None, itemsize: int = 2, dropout: bool = False) -> Entry:
        """The entry for a launch: of the smallest size that is large enough. ValueError where none is."""
        row = f"{self.name}/fp32" if itemsize >= 4 else f"{self.name}/dropout" if dropout else self.name
        row = row if arch in self.rows[row] else self.name
        sizes = self.rows[row][arch]
        if size is None or None in sizes:
            return Entry(self, arch, row, None)
        fits = [key for key in sizes if key >= size]
        if not fits:
            raise ValueError(f"{self.name}: size {size} is larger than {max(sizes)}, the largest that the kernel takes")
        return Entry(self, arch, row, min(fits))

    def parameters(
        self, device: torch.device, size: int | None = None, itemsize: int = 2, dropout: bool = False
    ) -> "Parameters":
        """For a launch on `device`: what ships, or what autotune chose over it, under what `override` says.

        size: of the dim that decides the tile. itemsize: bytes of an operand's element. dropout: a mask is drawn.
        """
        return Parameters(self.find(architecture(device), size, itemsize, dropout), device)


class Parameters(dict):
    """Keyword arguments of a launch: those of an entry, to which a launcher may add constants of its own."""

    def __init__(self, entry: Entry, device: torch.device):
        chosen = CONTROL.chosen.get(entry) if CONTROL.arch is None else None  # recorded for a GPU: what ships
        super().__init__(chosen or entry.parameters)
        for overridden in CONTROL.overrides:
            self.update({name: value for name, value in overridden.items() if name in self})
        self.entry, self.device = entry, device

    def launch(self, kernel, grid: tuple[int, ...], *args, **constants) -> None:
        """kernel[grid](*args, **constants) with these parameters, on the device, which need not be the current one."""
        constants |= self
        if CONTROL.records:
            launched = describe(kernel, self.entry, grid, args, constants)
            for record in CONTROL.records:
                record.launches.append(launched)
        if CONTROL.arch is None:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
                kernel[grid](*args, **constants)


def all_tiles() -> dict[str, Tiles]:
    """{name: tiles} of every kernel file of this folder."""
    found: dict[str, Tiles] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("interpreter_"):  # they mend the interpreter when they are imported, or fail without
            continue
        for value in vars(importlib.import_module(f"{__package__}.{module.name}")).values():
            if isinstance(value, Tiles) and found.setdefault(value.name, value) is not value:
                raise ValueError(f"two tiles are named {value.name}")
    return found


def tiles_named(name: str) -> Tiles:
    return all_tiles()[name]


def every_entry(arch: str) -> list[Entry]:
    """All that ships for an architecture class."""
    return [entry for tiles in all_tiles().values() for entry in tiles.entries(arch)]


@contextlib.contextmanager
def override(**parameters) -> Iterator[None]:
    """Inside, every launch uses these parameters over its entry's (num_stages=1, num_warps=8, ...), on every thread.

    A kernel takes those of them that its entry names. What autotune.py chose gives way, too.
    """
    CONTROL.overrides.append(parameters)
    try:
        yield
    finally:
        CONTROL.overrides.pop()


def describe(kernel, entry: Entry, grid: tuple[int, ...], args: tuple, constants: dict[str, Any]) -> Launch:
    """A launch as Triton specialises it: which arguments become constants, and which 16 is known to divide."""
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    kernel_arguments = inspect.signature(kernel.fn)
    given = kernel_arguments.bind(*args, **{n: v for n, v in constants.items() if n not in options}).arguments
    signature, constexprs, plain_integers = {}, {}, unspecialised(kernel)
    for name, value in given.items():
        constant = kernel_arguments.parameters[name].annotation is tl.constexpr
        if constant or value is None or (isinstance(value, int) and value == 1 and name not in plain_integers):
            constexprs[name] = value
        else:
            signature[name] = _triton_type(value, name not in plain_integers)
    return Launch(kernel, entry, grid, signature, constexprs, **options)


def _triton_type(value, specialised: bool) -> str:
    if isinstance(value, torch.Tensor):
        kind, divisible = f"*{_POINTERS[value.dtype]}", value.data_ptr() % 16 == 0
    else:
        kind, divisible = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
    return f"{kind}:16" if divisible and specialised else kind


_POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_POINTERS |= {torch.int32: "i32", torch.int64: "i64"}


def _emulated_target():
    """Target of an emulating driver, which takes CPU tensors; None under a real driver or none."""
    try:
        driver = triton.runtime.driver.active
        return driver.get_current_target() if getattr(driver, "accepts_cpu_tensors", False) else None
    except RuntimeError:  # "0 active drivers": no GPU here
        return None


def architecture(device: torch.device) -> str:
    """Architecture class of a device, or that which launches are recorded for."""
    if CONTROL.arch is not None:
        return CONTROL.arch
    if INTERPRETED:
        return "interpreter"
    if device.type == "cuda" and torch.version.hip:
        return "cdna3"
    target = _emulated_target() if device.type == "cpu" else None
    major = target.arch // 10 if target else torch.cuda.get_device_capability(device)[0]
    return "ampere" if major <= 8 else "hopper" if major == 9 else "blackwell"


def require_device(op: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless the Triton form of `op` can run where the tensor is."""
    device = tensor.device
    if device.type == "cuda" or (device.type == "cpu" and (CONTROL.arch or INTERPRETED or _emulated_target())):
        return
    raise ValueError(
        f"{op}: the Triton kernel was given {device.type} tensors; move them to a GPU, set TRITON_INTERPRET=1 before "
        f"the import, or call heiretsu.kernels.fused.{op}, which has a CPU form"
    )
