"""What steers and watches the kernels of this process: one object, `CONTROL`.

It holds what autotune chose over the shipped tiles, what `gpu.launch.override` says over both, and who records
(recording.py). All of that must reach a launch wherever it is made, and so it belongs to the process:

- Autograd runs a GPU's backward in threads of its own. A contextvars.Context of the caller does not go there: with one,
  no backward saw an override. A thread-local would not, either.
- torch.compile calls an operator from a graph that it made once. The launcher inside is not traced and asks here at
  each call, so that a graph never keeps a choice that was changed behind it.
- An argument cannot carry it: operators of torch.library take tensors and numbers.

Who writes, and for how long: `chosen` is autotune's (and, on the other ranks, that of who hands its choices on), until
the next tuning or the process ends; `overrides`, `records` and `arch` are of the `with` blocks that are open, and are
put back at their ends. Two threads that open such blocks at once would see each other's; nobody does.
"""

import dataclasses
from typing import Any

GPUS = ("ampere", "hopper", "blackwell", "cdna3")  # architecture classes; "interpreter" is one more


@dataclasses.dataclass
class Control:
    """chosen: {gpu.launch.Entry: parameters}. overrides: of parameters, innermost last. records: of open recordings.
    arch: the architecture class that launches are written down for instead of being made; None: they are made."""

    chosen: dict[Any, dict] = dataclasses.field(default_factory=dict)
    overrides: list[dict] = dataclasses.field(default_factory=list)
    records: list[Any] = dataclasses.field(default_factory=list)
    arch: str | None = None


CONTROL = Control()
