"""Where the numbers of a run go: the terminal, a file of JSON lines, and wandb."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from heiretsu.parallel.engine import StepReport
from heiretsu.parallel.mesh import Mesh
from heiretsu.run.config import RunConfig
from heiretsu.run.data_sheets import data_sheet

LONGEST_SILENCE_S = 20.0


class RunLog:
    """Writes on rank 0 alone; on the other ranks every call does nothing.

    A record is one step's numbers. To what the caller gives are added mfu (where the device's peak is known) and
    memory_mib, the most that rank 0 has held. A number that is not finite is null in the file, as JSON has none.

    first_step: what a resumed run begins with; the file, and the wandb run of run_id, hold each step once.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, first_step: int = 0, run_id: str | None = None):
        self.config, self.mesh, self.writes = config, mesh, mesh.rank == 0
        self.file: LogFile | None = None
        self.bar = None
        self.wandb: Any = None
        if not self.writes:
            return
        self.last_line = time.perf_counter()
        self.peak_flops = peak_flops(mesh, config)
        if config.log_file:
            self.file = LogFile(config.log_file, first_step)
        if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self.bar = tqdm(total=config.max_iters, initial=first_step, unit="step", dynamic_ncols=True)
        if config.wandb:
            self._start_wandb(run_id)

    def write(self, record: dict[str, float], report: StepReport) -> None:
        """One step's numbers. record holds at least step, loss and tokens_per_s."""
        if not self.writes:
            return
        if self.peak_flops:
            record["mfu"] = record["tokens_per_s"] * self.config.model.flops_per_token / self.peak_flops
        record["memory_mib"] = peak_memory_mib(self.mesh.device)
        if self.file and (problem := self.file.append(record)):
            self.say(f"warning: {problem}")
        if self.wandb:
            try:  # wandb's own process may be gone: a signal to all of a job's processes ends it before it ends us
                if record["step"] >= self.wandb.run.step:  # a resumed wandb run has the steps before
                    self.wandb.log({**record, **self._expert_load(report)}, step=record["step"])
            except Exception as error:
                self._lose_wandb(error)
        self._show(record, report)

    def _start_wandb(self, run_id: str | None) -> None:
        """Where the server cannot be had, the run is recorded on disk, and where that cannot be, without wandb."""
        for mode in dict.fromkeys((self.config.wandb_mode, "offline")):
            try:
                import wandb  # only those who ask for it need it

                wandb.init(
                    project=self.config.wandb_project,
                    entity=self.config.wandb_entity,
                    mode=mode,
                    name=self.config.run_name,
                    id=run_id,
                    resume="allow" if run_id and mode == "online" else None,
                    config=self.config.as_json(),
                )
            except Exception as error:  # a network, a key, a full disk: no reason not to train
                self._lose_wandb(error, "; it is recorded on disk" if mode == "online" else "")
            else:
                self.wandb = wandb
                return

    def _lose_wandb(self, error: Exception, then: str = "") -> None:
        why = str(error).strip().split("\n")[0] or type(error).__name__
        self.say(f"warning: wandb: {why}: the run goes on without it{then}")
        self.wandb = None

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
            self.bar.write(line) if self.bar is not None else print(line, flush=True)

    def _expert_load(self, report: StepReport) -> dict:
        """For wandb: the share of tokens of each expert of each mixture layer, and a bar chart of the whole model's."""
        load = report.metrics.get("expert_load")
        if load is None:
            return {}
        shares = (load / load.sum(1, keepdims=True)).tolist()
        numbers = {f"expert_load/layer{i}/expert{e}": s for i, row in enumerate(shares) for e, s in enumerate(row)}
        total = (load.sum(0) / load.sum()).tolist()
        table = self.wandb.Table(columns=["expert", "share"], data=[[f"expert {e}", s] for e, s in enumerate(total)])
        return {**numbers, "expert_load/chart": self.wandb.plot.bar(table, "expert", "share", title="Tokens by expert")}

    def close(self) -> None:
        for sink in (self.bar, self.file):
            if sink is not None:
                sink.close()
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:
                self._lose_wandb(error)


class LogFile:
    """A file of JSON lines, one a step and each step once. A line is there whole or not at all, on a full disk too.

    first_step: of the run that goes on; what the file holds from there on is taken away, for it will be written again.
    """

    def __init__(self, path: str | os.PathLike, first_step: int):
        self.path, self.complained = Path(path), False
        if first_step and self.path.exists():
            _keep_steps_before(self.path, first_step)
        self.file = open(self.path, "ab", buffering=0)
        if not first_step:
            self.file.truncate(0)

    def append(self, record: dict[str, float]) -> str | None:
        """Write a line. What went wrong, the first time that something does; training goes on."""
        line = json.dumps({key: _finite(value) for key, value in record.items()}).encode() + b"\n"
        end = self.file.seek(0, os.SEEK_END)  # not tell(): what was taken back does not move it
        try:
            written = self.file.write(line)
            if written == len(line):
                return None
            error = f"{written} of {len(line)} bytes could be written"
        except OSError as failure:
            error = str(failure.strerror)
        with contextlib.suppress(OSError):
            self.file.truncate(end)
        complained, self.complained = self.complained, True
        return None if complained else f"--log_file {self.path}: {error}: lines are lost until there is room"

    def close(self) -> None:
        self.file.close()


def _keep_steps_before(path: Path, first_step: int) -> None:
    """Rewrite a log with the last line of each step before first_step; a torn line goes. It is replaced as a whole."""
    lines: dict[int, bytes] = {}
    with open(path, "rb") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue
            if isinstance(step, int) and step < first_step:
                lines[step] = line.rstrip(b"\n") + b"\n"
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "wb") as file:
        file.writelines(lines[step] for step in sorted(lines))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_flops(mesh: Mesh, config: RunConfig) -> float | None:
    """FLOP/s of all devices of the run: of the data sheet on a GPU, measured on a CPU; None where neither is known.

    A CPU is asked once, with matrix products in the dtype of the activations, for a tenth of a second or so. All ranks
    are taken to share it.
    """
    if mesh.device.type == "cuda":
        sheet = data_sheet(torch.cuda.get_device_name(mesh.device))
        return None if sheet is None else sheet.bf16_flops * mesh.world.size
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
