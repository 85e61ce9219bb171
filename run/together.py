"""All ranks of a run, from the roll call to the end: what train.py does with the others happens in one `with`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from heiretsu.parallel.mesh import abstract_mesh, process_groups
from heiretsu.run.config import RunConfig
from heiretsu.run.options import refuse
from heiretsu.run.roll_call import Report, assemble
from heiretsu.run.watch import GRACE_S, watched


@contextmanager
def together(config: RunConfig, backend: str, rank: int, report: Report) -> Iterator[None]:
    """Process groups for the block, once all ranks have agreed, and the watch over them; nothing of it for one process.

    rank: in the mesh. report: what this rank brings; where it or any other brings a refusal, or they differ, all end
    with status 2.
    """
    if config.num_ranks == 1:
        if report.refused:
            refuse(report.refused)
        yield
        return
    try:
        assembly, store = assemble(rank, config.num_ranks, config.timeout, report)
    except ValueError as error:
        refuse(error)
    if assembly.refused:
        refuse(assembly.refused)
    # The collectives' own limit comes after the watch's, which can say whom they wait for.
    timeout = timedelta(seconds=config.timeout + 2 * GRACE_S)
    name = abstract_mesh(*config.mesh, rank).coordinates()
    with (
        process_groups(backend, config.num_ranks, store=store, rank=rank, timeout=timeout),
        watched(assembly, config.timeout, name),
    ):
        yield
