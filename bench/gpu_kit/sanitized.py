"""The program that runs under compute-sanitizer: forward and backward of a few tiny rows, each op once.

compute-sanitizer --tool racecheck python -m heiretsu.bench.gpu_kit.sanitized cuda 0
"""

import sys

import torch

from heiretsu.kernels import fused
from tests.kernels import forms
from tests.kernels.cases import all_cases
from tests.kernels.parity import dtype_name, run


def main(device: str, rehearse: bool) -> None:
    if forms.INTERPRETED:
        from heiretsu.offgpu.interpreter import watch

        watch()
    rows = [(case, dtype) for dtype in (torch.bfloat16, torch.float32) for case in all_cases() if case.emulate]
    rows = [(case, dtype) for case, dtype in rows if dtype in case.dtypes]
    for case, dtype in rows[:1] if rehearse else rows:
        run(case, dtype, getattr(fused, case.op), device)
        print(f"row {case.op}/{case.name}/{dtype_name(dtype)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1")
