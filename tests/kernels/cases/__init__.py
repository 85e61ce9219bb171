"""The parity table: one file an op (or a family of ops), each with CASES and, for Triton kernels, MUTATIONS."""

import dataclasses
import importlib
import pkgutil

from tests.kernels.parity import Case, Mutation


def all_cases() -> list[Case]:
    """Every case of every table; raises ValueError where two of one op have the same name."""
    cases = [case for table in _tables() for case in table.CASES]
    rows = [(case.op, case.name) for case in cases]
    for row in rows:
        if rows.count(row) > 1:
            raise ValueError(f"two cases of {row[0]} are named {row[1]!r}")
    return cases


def all_mutations() -> list[tuple[Mutation, Case]]:
    """Every mutation, with the case of its table that must catch it; raises ValueError where that is not one case."""
    pairs = []
    for table in _tables():
        own_file = table.__name__.rpartition(".")[2] + ".py"
        for mutation in getattr(table, "MUTATIONS", []):
            mutation = dataclasses.replace(mutation, file=mutation.file or own_file)
            cases = [c for c in table.CASES if c.name == mutation.caught_by and mutation.op in (None, c.op)]
            if len(cases) != 1:
                raise ValueError(f"mutation {mutation.id}: {len(cases)} cases are named {mutation.caught_by!r}")
            pairs.append((mutation, cases[0]))
    return pairs


def _tables() -> list:
    return [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
