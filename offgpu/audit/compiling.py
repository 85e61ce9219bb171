"""Compile one @triton.jit function ahead of time for a machine that is not here."""

import warnings

import triton
from triton.compiler import ASTSource

from heiretsu.offgpu.machines import Machine


def compile_kernel(machine: Machine, fn, signature, constexprs, num_warps, num_stages, **options):
    """Triton's CompiledKernel, through Triton's cache; nothing is launched.

    signature: {argument: Triton type}, ":16" after a type says divisible by 16 (what the JIT infers from aligned
    pointers and round strides; without it loads are scalar). constexprs: {argument: value}, with the strides that the
    JIT would specialise to 1. For AMD the JIT also tells the compiler which tensors are smaller than 2 GiB: all, here.
    options: of the backend (maxnreg, ...). ValueError if an argument is in neither.
    """
    while not isinstance(fn, triton.runtime.jit.JITFunction):
        fn = getattr(fn, "fn", None)  # an Autotuner or Heuristics around it
        if fn is None:
            raise ValueError("not a compiled @triton.jit function (with TRITON_INTERPRET=1 there is none: unset it)")
    names = list(fn.arg_names)
    missing = [name for name in names if name not in signature and name not in constexprs]
    if missing:
        raise ValueError(f"{fn.__name__}: no type and no value for {', '.join(missing)}")
    types, attributes = {}, {}
    for position, name in enumerate(names):
        if name in constexprs:
            types[name] = "constexpr"
            continue
        kind, divisible = signature[name], ""
        if not kind.startswith("tensordesc"):
            kind, _, divisible = kind.partition(":")
        types[name] = kind
        known = [["tt.divisibility", int(divisible)]] if divisible else []
        if machine.is_amd and kind.startswith("*"):
            known.append(["tt.pointer_range", 32])
        if known:
            attributes[(position,)] = known
    values = {(names.index(name),): value for name, value in constexprs.items()}
    source = ASTSource(fn=fn, signature=types, constexprs=values, attrs=attributes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fusion.*")  # its default changes between releases of Triton
        return triton.compile(
            source, target=machine.target, options={"num_warps": num_warps, "num_stages": num_stages, **options}
        )
