"""What a GPU says about this library: the parts of `python bench/gpu.py`, in order of worth.

    facts    the card, driver and versions; the roofs that it reaches here
    right    every row of the parity table and every shipped launch, compiled for real; far offsets; races; sanitizers
    proof    what the audit and the emulator said beforehand, beside what the device says
    fast     each op beside the best alternatives that are installed
    train    whole steps, a run that is stopped and resumed, the curve of a CPU, autotune, a profile
    several  more than one GPU: topologies over NCCL, throughput, overlap

Each part is a module with PHASES, which says how many processes work on it at once, and items(kit, group), which lists
what they do, the most worth first. `worker` is such a process; `runner` starts them, ends what takes too long and goes
on behind what died; `record` is what they write, a line a figure; `report` reads that. `kit` is what an item is given,
`rehearsal` what stands in for a GPU where there is none. So a crash, a fault of the device, a hang or a part that
runs out of memory loses its own item and nothing else, and a run that is cut off has all that it had found.

`right` and `proof` need the tests beside this folder: the kit runs from a checkout.
"""
