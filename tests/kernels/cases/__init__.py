"""The parity table: one file an op (or a family of ops), each with CASES and, for Triton kernels, MUTATIONS."""

import importlib
import pkgutil

from tests.kernels.parity import Case, Mutation


def _tables() -> list:
    return [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]


def all_cases() -> list[Case]:
    return [case for table in _tables() for case in table.CASES]


def all_mutations() -> list[Mutation]:
    return [mutation for table in _tables() for mutation in getattr(table, "MUTATIONS", [])]
