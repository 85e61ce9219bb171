"""One process of one part: does its share of the items, one after the other, and says of each how it went.

Started by `runner`. What this process or one before it has begun is not begun again, so that the one which is started
behind a crash goes on with the next item. Exit status: 0, or SICK where the device no longer answers.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import signal
import sys
import traceback
from pathlib import Path

SICK = 3
REHEARSAL_PATIENCE = 6


def main() -> int:
    args = parse(sys.argv[1:])
    die_with_parent()

    import torch

    from heiretsu.bench.gpu_kit import rehearsal
    from heiretsu.bench.gpu_kit.device import Device
    from heiretsu.bench.gpu_kit.kit import Kit
    from heiretsu.bench.gpu_kit.record import Record
    from heiretsu.bench.timing import FLUSH_BYTES

    if args.rehearse:
        rehearsal.install()
        device = rehearsal.device()
    else:
        device = Device(torch.cuda, torch.device("cuda"), FLUSH_BYTES)
    writer = Record(args.out, args.part, args.group, args.worker)
    kit = Kit(args.out, args.scratch, device, args.rehearse, args.seconds, writer)
    part = importlib.import_module(f"heiretsu.bench.gpu_kit.{args.part}")
    return work(kit, part.items(kit, args.group)[args.worker :: args.workers])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("group")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args(argv)


def work(kit, items) -> int:
    """Do the items in order. A failure is written down, and the next item's turn comes."""
    stamp = kit.writer.stamp
    before = {line["name"] for line in kit.recorded(stamp["part"], "begin") if line["group"] == stamp["group"]}
    todo = [item for item in items if item.name not in before]
    for position, item in enumerate(todo):
        if kit.seconds_left() <= 0:
            names = ", ".join(other.name for other in todo[position : position + 3])
            left = len(todo) - position
            kit.absent(f"{left} of {len(items)} items", f"out of time: {names}{', ...' * (left > 3)}")
            return 0
        kit.writer.write("begin", item.name, limit_s=item.limit_s * (REHEARSAL_PATIENCE if kit.rehearse else 1))
        with kit.named(item.name):
            well = attempt(kit, item)
        kit.writer.write("end", item.name)
        if not well:
            return SICK
    return 0


def attempt(kit, item) -> bool:
    """Run one item; whether the device still answers."""
    from heiretsu.bench.gpu_kit.device import is_out_of_memory

    try:
        item.run()
        kit.device.synchronize()  # a fault of its last launch shows here
        return True
    except Exception as error:
        traceback.print_exc()
        detail = f"{type(error).__name__}: {str(error).strip()[:1500]}"
        if is_out_of_memory(error):
            kind = "out of memory"
        elif isinstance(error, AssertionError):
            kind, detail = "wrong", str(error).strip()[:1500]
        else:
            kind = "error"
    kit.device.release_memory()
    well = kit.device.is_well()
    kit.failure(kind if well else "fault", detail)
    return well


def die_with_parent() -> None:
    """Where the kernel offers it (Linux): nothing is left behind on a machine that somebody else pays for."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
