"""A Triton driver whose GPU is the emulator: `kernel[grid](...)`, autotuning and launchers run unchanged, on the CPU.

Triton compiles as for a real GPU, its bundled ptxas included, so this needs a process without TRITON_INTERPRET. What
depends on the release of Triton (tried: 3.6.0 to 3.9.0) is in `_descriptor_arguments`, `_scratch`, `_find_ptx`, and in
`parser._steady_lines`.
"""

import contextlib
import types
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver as triton_driver

from heiretsu.offgpu.emulator.machine import execute
from heiretsu.offgpu.emulator.report import FATAL, PTXError, Report, Unsupported

SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # that a CTA may have


class EmulatedDriver:
    """Stands for a GPU of compute capability `target`; `reports` gets one Report for each launch.

    options: of `machine.execute` (check, schedule, seed, limit, ...).
    """

    accepts_cpu_tensors = True  # kernels/gpu/launch.py asks for this

    def __init__(self, target: int = 80, **options):
        self.target, self.options = target, options
        self.reports: list[Report] = []
        self.utils = _Utils(target)

    @property
    def findings(self) -> list:
        """All findings of all launches."""
        return [finding for report in self.reports for finding in report]

    def launcher_cls(self, source, metadata):
        def launch(*args):  # compiled kernels are cached: report to the driver that is active now
            active = triton_driver._active
            (active if isinstance(active, EmulatedDriver) else self)._launch(source, metadata, args)
            return None

        return launch

    def _launch(self, source, metadata, args):
        gx, gy, gz, _stream, _function, _packed, _launch_metadata, _enter, _exit, *args = args
        num_ctas = gx * gy * gz
        descriptors = iter(getattr(metadata, "tensordesc_meta", None) or [])
        flat = []
        for type_name, value in zip(source.signature.values(), args, strict=True):
            flat.extend(_flatten(type_name, value, descriptors))
        flat.extend(_scratch(metadata, num_ctas))
        report = Report()
        self.reports.append(report)
        if num_ctas:
            execute(
                _find_ptx(metadata),
                (gx, gy, gz),
                flat,
                metadata.shared,
                metadata.num_warps,
                metadata.name,
                report=report,
                exact=True,
                **self.options,
            )

    # ---- what Triton asks a driver

    def get_current_target(self):
        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self):
        return self.target  # one "device" for each target: Triton caches compiled kernels by it

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.target, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        def event(*args, **kwargs):  # do_bench: a long time, so few repetitions
            nothing = types.SimpleNamespace(record=lambda *a: None, synchronize=lambda *a: None)
            nothing.elapsed_time = lambda end: 1e3
            return nothing

        return types.SimpleNamespace(synchronize=lambda *a: None, Event=event, current_device=lambda: self.target)

    def get_benchmarker(self):
        def benchmark(fn, quantiles=None, **kwargs):
            fn()
            return [0.0] * len(quantiles or [1])

        return benchmark

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass

    @staticmethod
    def is_active():
        return True


class _Utils:
    """The C half of a driver."""

    def __init__(self, target):
        self.target = target

    def load_binary(self, name, kernel, shared, device):
        return None, object(), 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module):
        pass

    def set_printf_fifo_size(self, size):
        pass

    def get_device_properties(self, device):
        return dict(
            max_shared_mem=SHARED_BYTES.get(self.target, 101376),
            multiprocessor_count=108,
            max_num_regs=65536,
            warpSize=32,
            sm_clock_rate=1410000,
            mem_clock_rate=1215000,
            mem_bus_width=5120,
        )


def _flatten(type_name, value, descriptors):
    """Launch arguments as the PTX takes them: tuples flat, constexprs gone, 16-bit floats as bytes."""
    if isinstance(type_name, tuple | list):
        for inner_type, inner in zip(type_name, value, strict=True):
            yield from _flatten(inner_type, inner, descriptors)
    elif type_name.startswith("tensordesc"):
        yield from _descriptor_arguments(value, next(descriptors, None))
    elif type_name in ("fp16", "bf16"):
        dtype = torch.float16 if type_name == "fp16" else torch.bfloat16
        yield bytes(torch.tensor(float(value), dtype=dtype).view(torch.uint8).numpy())
    elif type_name[:2] in ("fp", "bf"):
        yield float(value)
    elif type_name[0] == "*" and not isinstance(value, torch.Tensor) and hasattr(value, "base"):
        yield value.base  # triton.reinterpret
    elif type_name != "constexpr":
        yield value


def _descriptor_arguments(descriptor, tma):
    """Arguments that stand for a host TensorDescriptor (Triton passes shape and strides twice)."""
    if tma:
        raise Unsupported("TMA tensor descriptor (the kernel was compiled to use TMA; on target 80 it is not)")
    shape, strides = descriptor.shape, descriptor.strides
    flags = [descriptor.padding == "nan"]
    if hasattr(descriptor, "round_f32_to_tf32"):  # not in 3.6
        flags.append(descriptor.round_f32_to_tf32)
    return [descriptor.base, *shape, *strides, *flags, *shape, *strides]


def _scratch(metadata, num_ctas):
    """The hidden last two parameters."""
    num_ctas *= getattr(metadata, "num_ctas", 1)
    sizes = [getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    return [torch.zeros(max(size * num_ctas, 1), dtype=torch.uint8) for size in sizes]


def _find_ptx(metadata) -> str:
    """Triton keeps the PTX of every kernel in its cache folder."""
    group = get_cache_manager(metadata.hash).get_group(metadata.name + ".json") or {}
    path = next((path for name, path in group.items() if name.endswith(".ptx")), None)
    if path is None:
        raise PTXError(f"no PTX of {metadata.name} in the Triton cache (TRITON_STORE_BINARY_ONLY must be off)")
    return Path(path).read_text()


@contextlib.contextmanager
def installed(target: int = 80, **options):
    """Inside, the emulator is Triton's active driver; yields it. options: those of `execute` (schedule, seed, ...)."""
    before = triton_driver._active
    emulated = EmulatedDriver(target, **options)
    triton_driver.set_active(emulated)
    try:
        yield emulated
    finally:
        triton_driver._active = before


def run(
    kernel,
    grid,
    args,
    constexprs: dict | None = None,
    num_warps: int = 4,
    target: int = 80,
    num_stages: int | None = None,
    check: bool = True,
    schedule: str = "lockstep",
    seed: int = 0,
    limit: int | None = None,
    **options,
) -> Report:
    """Compile a `@triton.jit` function for sm_<target> and execute it; tensors in args change in place.

    Returns the Report of the (last) launch. A finding that stops the run is returned too; anything else is an error.
    """
    keywords = {**(constexprs or {}), **options}
    if not hasattr(kernel, "configs"):  # not autotuned
        keywords["num_warps"] = num_warps
        if num_stages is not None:
            keywords["num_stages"] = num_stages
    with installed(target, check=check, schedule=schedule, seed=seed, limit=limit) as emulated:
        try:
            kernel[grid](*args, **keywords)
        except PTXError as error:
            report = emulated.reports[-1] if emulated.reports else Report()
            if not FATAL & set(report.kinds()):
                raise type(error)(f"{error}\nbefore that: {report}" if report else str(error)) from error
    if not emulated.reports:
        raise PTXError("nothing was launched (is TRITON_INTERPRET set?)")
    return emulated.reports[-1]
