"""What `make cluster` shows, row by row: the table that docs/several-machines.md holds."""

ROWS = {
    "dp": "torchrun, 2 hosts x 2 ranks: dp 4",
    "tp": "torchrun, 2 hosts x 2 ranks: tp 4",
    "pp": "torchrun, 2 hosts x 2 ranks: pp 4",
    "ep": "torchrun, 2 hosts x 2 ranks: ep 4",
    "mixtures": "torchrun, 2 hosts x 2 ranks: mixtures of the axes",
    "names": "names of both hosts resolve to loopback on themselves",
    "meeting": "a node missing, a port taken, a wrong interface, rank or address",
    "data": "another data folder on one host",
    "slurm finished": "Slurm: two jobs at once on the same nodes, finished",
    "slurm requeue": "Slurm: scontrol requeue",
    "slurm limit": "Slurm: time limit near",
    "slurm cancel": "Slurm: scancel",
    "slurm node": "Slurm: a node's processes killed",
    "cable training": "cable pulled while training",
    "cable saving": "cable pulled while saving",
    "cable waiting for a save": "cable pulled while all wait for a save",
    "cable starting": "cable pulled while starting",
    "modal": "Modal's container function, called in both hosts",
    "wire": "100 Mbit/s between the hosts",
}


def markdown(results: dict[str, str]) -> str:
    lines = ["| what | what was seen |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {text} | {results[name]} |" for name, text in ROWS.items() if name in results)])
