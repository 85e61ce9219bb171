"""Where the numbers of a run go: the terminal, a file of JSON lines, and wandb."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from heiretsu.model.options import RunConfig
from heiretsu.parallel.engine import StepReport
from heiretsu.parallel.mesh import Mesh

# Dense bf16 FLOP/s of the data sheets: what model FLOPs utilisation (MFU) is against.
DATA_SHEET_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12}
LONGEST_SILENCE_S = 20.0


class RunLog:
    """Writes on rank 0 alone; on the other ranks every call does nothing.

    A record is one step's numbers. To what the caller gives are added mfu (where the device's peak is known) and
    memory_mib, the most that rank 0 has held.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, first_step: int = 0):
        self.config, self.mesh, self.writes = config, mesh, mesh.rank == 0
        self.file = self.bar = self.wandb = None
        if not self.writes:
            return
        self.last_line = time.perf_counter()
        self.peak_flops = peak_flops(mesh, config)
        if config.log_file:
            Path(config.log_file).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(config.log_file, "a" if first_step else "w", buffering=1)
        if sys.stderr.isatty():
            self.bar = tqdm(total=config.max_iters, initial=first_step, unit="step", dynamic_ncols=True)
        if config.wandb:
            import wandb  # only those who ask for it need it

            self.wandb = wandb
            wandb.init(
                project=config.wandb_project,
                entity=config.wandb_entity,
                mode=config.wandb_mode,
                name=config.run_name,
                config=json.loads(config.to_json()),
            )

    def write(self, record: dict[str, float], report: StepReport) -> None:
        """One step's numbers. record holds at least step, loss and tokens_per_s."""
        if not self.writes:
            return
        if self.peak_flops:
            record["mfu"] = record["tokens_per_s"] * self.config.model.flops_per_token / self.peak_flops
        record["memory_mib"] = peak_memory_mib(self.mesh.device)
        if self.file:
            print(json.dumps(record), file=self.file)
        if self.wandb:
            self.wandb.log({**record, **self._expert_load(report)}, step=record["step"])
        self._show(record, report)

    def _show(self, record: dict[str, float], report: StepReport) -> None:
        """The progress bar on a terminal; elsewhere about twenty lines a run, more of a slow one, and those that say
        something more."""
        brief = f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s"
        if "mfu" in record:
            brief += f", MFU {100 * record['mfu']:.0f}%"
        if self.bar is not None:
            self.bar.set_postfix_str(brief, refresh=False)
            self.bar.update()
        skipped = f", skipped: {report.not_finite}" if report.skipped else ""
        evaluated = f", validation loss {record['eval_loss']:.4f}" if "eval_loss" in record else ""
        if "eval_bits_per_byte" in record:
            evaluated += f" ({record['eval_bits_per_byte']:.3f} bits per byte)"
        step, every = record["step"] + 1, max(1, self.config.max_iters // 20)
        due = step % every == 0 or step == 1 or time.perf_counter() - self.last_line > LONGEST_SILENCE_S
        if skipped or evaluated or (self.bar is None and due):
            self.last_line = time.perf_counter()
            total = str(self.config.max_iters)
            self.say(f"step {step:>{len(total)}}/{total}: {brief}{evaluated}{skipped}")

    def say(self, line: str) -> None:
        """A line on the terminal, above the progress bar where there is one."""
        if self.writes:
            tqdm.write(line) if self.bar is not None else print(line, flush=True)

    def _expert_load(self, report: StepReport) -> dict:
        """For wandb: the share of tokens of each expert of each mixture layer, and a bar chart of the whole model's."""
        if report.expert_load is None:
            return {}
        shares = (report.expert_load / report.expert_load.sum(1, keepdim=True)).tolist()
        numbers = {f"expert_load/layer{i}/expert{e}": s for i, row in enumerate(shares) for e, s in enumerate(row)}
        total = (report.expert_load.sum(0) / report.expert_load.sum()).tolist()
        table = self.wandb.Table(columns=["expert", "share"], data=[[f"expert {e}", s] for e, s in enumerate(total)])
        return {**numbers, "expert_load/chart": self.wandb.plot.bar(table, "expert", "share", title="Tokens by expert")}

    def close(self) -> None:
        for sink in (self.bar, self.file):
            if sink is not None:
                sink.close()
        if self.wandb:
            self.wandb.finish()


def peak_flops(mesh: Mesh, config: RunConfig) -> float | None:
    """FLOP/s of all devices of the run: of the data sheet on a GPU, measured on a CPU; None where neither is known.

    A CPU is asked once, with matrix products in the dtype of the activations, for a tenth of a second or so. All ranks
    are taken to share it.
    """
    if mesh.device.type == "cuda":
        name = torch.cuda.get_device_name(mesh.device)
        return next((peak * mesh.world.size for known, peak in DATA_SHEET_PEAKS.items() if known in name), None)
    if mesh.device.type != "cpu":
        return None
    dtype = torch.bfloat16 if config.amp == "bf16" else getattr(torch, config.dtype)
    x = torch.ones(512, 512, dtype=dtype, device="cpu")
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - began)
    return 2 * 512**3 / best


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that this process has held: on its GPU, or resident on a machine without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
