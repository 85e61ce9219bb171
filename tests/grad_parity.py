"""The gradient of every named parameter on a mesh against one process; a missing gradient fails.

torchrun --standalone --nproc_per_node=4 tests/grad_parity.py --dp 1 --tp 2 --pp 2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # torchrun puts this folder on the path, not the repository

from tests.torchrun import config_of, gather, on_mesh, parser
from tests.training import assemble, differences, run_steps, single_process


def verdict(mesh) -> dict[str, str]:
    traces = gather(mesh, run_steps(mesh, config, 0, ops="fused" if flags.fused else "plain"))
    if mesh.rank != 0:
        return {}
    ours, disagreement = assemble([trace.first_grads for trace in traces])
    theirs, _ = assemble([single_process(config, 0, device=mesh.device).first_grads])
    for name in sorted(theirs):
        gap = (ours[name] - theirs[name]).abs().max().item() if name in ours else float("nan")
        print(f"{name}: largest element {theirs[name].abs().max().item():.3e}, largest difference {gap:.1e}")
    found = {f"copies of {name}": f"differ by {gap:.1e}" for name, gap in disagreement.items() if gap > 0}
    return found | differences(ours, theirs, flags.thresh)


flags = parser(__doc__).parse_args()
config = config_of(flags)
on_mesh(config, verdict)
