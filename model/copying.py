"""Modules that can be copied and pickled although they hold their ops, which are a Python module."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import nn


class HoldsOps(nn.Module):
    """A module that is handed `ops`: heiretsu.kernels.plain or .fused, or anything with the same functions.

    Python cannot copy or pickle a module: a copy holds the same one, and a pickle its name.
    """

    def __init__(self, ops):
        super().__init__()
        self.ops = ops

    def __getstate__(self) -> dict:
        state = {**self.__dict__}
        state.pop("_compiled_call_impl", None)  # as nn.Module does, which has not had __getstate__ in every version
        if isinstance(self.ops, ModuleType):
            state["ops"] = _Name(self.ops.__name__)
        return state

    def __setstate__(self, state: dict) -> None:
        ops = state.get("ops")
        super().__setstate__({**state, "ops": importlib.import_module(ops)} if isinstance(ops, _Name) else state)


class _Name(str):
    """Of the Python module that stands here."""
