"""Pipeline schedules as data: for each rank of the axis pp, the list of what it does, in order.

A schedule is a pure function of sizes, in a file of its own, found here by being there. `lower` adds the sends and
receives; `validate`, `simulate` and `draw` work on the lists alone, without a process group. The executor that carries
them out is `heiretsu.parallel.pipeline`. Nothing here imports torch: the command line reads the names.
"""

from importlib import import_module
from pkgutil import iter_modules

from heiretsu.parallel.schedules.forward_only import forward_only
from heiretsu.parallel.schedules.lowering import lower
from heiretsu.parallel.schedules.registry import SCHEDULES, PipelineSchedule
from heiretsu.parallel.schedules.simulation import Timeline, draw, simulate
from heiretsu.parallel.schedules.validation import validate

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["SCHEDULES", "PipelineSchedule", "Timeline", "draw", "forward_only", "lower", "simulate", "validate"]
