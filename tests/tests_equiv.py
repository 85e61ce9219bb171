"""A whole training run on a mesh against one process: losses, norms, every gradient, and the weights after the last
step.

    torchrun --standalone --nproc_per_node=2 tests/tests_equiv.py --tp 2

Ends with `diff=...`, the largest relative difference of a loss, and exit status 1 if anything differs by more than
--thresh.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun puts this folder on the path, not the repository

from tests.torchrun import config_of, gather, on_mesh, parser
from tests.training import failures, run_steps, single_process


def verdict(mesh) -> dict[str, str]:
    traces = gather(mesh, run_steps(mesh, config, flags.steps, ops="fused" if flags.fused else "plain"))
    if mesh.rank != 0:
        return {}
    reference = single_process(config, flags.steps, device=mesh.device)
    pairs = [pair for trace in traces for pair in zip(trace.losses, reference.losses, strict=True)]
    print(f"losses {', '.join(f'{loss:.6f}' for loss in traces[0].losses)}")
    print(f"diff={max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs):.2g}")
    return failures(traces, reference, flags.thresh)


flags = parser(__doc__).parse_args()
config = config_of(flags)
on_mesh(config, verdict)
