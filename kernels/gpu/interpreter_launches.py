"""Launches in Triton's interpreter: silent as on a GPU, and quick where device functions are called.

NumPy warns of every overflow and 0/0, which kernels make on purpose in lanes that they mask. And a kernel's launch
redirects triton.language to NumPy and sets it back at the end, but each call of another @triton.jit function from
inside redirects it once more, a walk over some hundred names, and never sets it back. Here every function does so
once a launch, and the launch undoes it.
"""

import functools

import numpy as np
from triton.runtime import interpreter

from heiretsu.kernels import versions


def install() -> None:
    """Patch the interpreter's launches; a second call does nothing."""
    if hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    launch, redirect = interpreter.GridExecutor.__call__, interpreter._patch_lang
    scopes = {}  # of the launch that is running: function -> what it redirected

    @functools.wraps(redirect)
    def redirect_once(function):
        if function not in scopes:
            scopes[function] = scope = redirect(function)
            versions.let_interpreter_count(scope)
            first = next(iter(scopes.values()))
            if scope is not first:
                first._changes += scope._changes  # the launch sets back the first one's, latest change first
        return scopes[function]

    @functools.wraps(launch)
    def launch_alone(self, *args, **kwargs):
        scopes.clear()
        with np.errstate(all="ignore"):
            return launch(self, *args, **kwargs)

    interpreter._patch_lang = redirect_once
    interpreter.GridExecutor.__call__ = launch_alone
