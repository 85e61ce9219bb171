"""Which processes work on which part, and what share of the time each part may take. Known without importing torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Processes that deal a list of items out among themselves. workers: on a GPU; a rehearsal takes `rehearsed`.

    interpreted: a rehearsal runs the Triton kernels in Triton's interpreter there, which is decided at import.
    """

    name: str
    workers: int = 1
    rehearsed: int = 1
    interpreted: bool = False


@dataclass(frozen=True)
class Part:
    """minutes: of a run of eight; whatever an earlier part leaves is shared out among the later ones. phases: groups
    that work at the same time, one phase after the other; nothing runs beside what is timed."""

    minutes: float
    phases: tuple[tuple[Group, ...], ...]


PARTS = {
    "facts": Part(0.3, ((Group("roofs"),),)),
    "right": Part(
        2.2,
        (
            (
                Group("rows", workers=12, rehearsed=2, interpreted=True),
                Group("large", interpreted=True),
                Group("sanitizer", interpreted=True),
            ),
        ),
    ),
    "proof": Part(1.0, ((Group("resources", workers=8), Group("bits", workers=6)), (Group("bounds"),))),
    "fast": Part(2.2, ((Group("warm", workers=4),), (Group("time"),))),
    "train": Part(2.3, ((Group("steps"),),)),
    "several": Part(1.5, ((Group("ranks"),),)),
}
