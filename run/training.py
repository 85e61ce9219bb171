"""The training loop: a step, its log line, and now and then an evaluation, a comparison or a checkpoint."""

from __future__ import annotations

import math
import sys
import time

from heiretsu.data.batches import TokenDataset
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh
from heiretsu.parallel.profiling import StepProfiler
from heiretsu.parallel.replicas import first_difference
from heiretsu.run.batches import evaluate, read_batches
from heiretsu.run.config import RunConfig
from heiretsu.run.log import RunLog
from heiretsu.run.sampling import find_tokenizer, sample
from heiretsu.run.saving import Saver
from heiretsu.run.stop import Stop
from heiretsu.run.stragglers import Stragglers


def train(
    config: RunConfig,
    mesh: Mesh,
    engine: Engine,
    train_data: TokenDataset,
    val_data: TokenDataset,
    first_step: int = 0,
    facts: dict[str, str] | None = None,
) -> None:
    """All ranks call it. facts: for the checkpoints. Exits with another status than 0 where the run ends badly."""
    tokenizer = find_tokenizer(config, mesh)  # now, so that nothing is learned at the end of a long run
    facts = facts or {}
    log, stop, ending = RunLog(config, mesh, first_step, facts.get("run_id")), Stop(config), None
    stragglers, saver = Stragglers(mesh), Saver(config, engine, facts, log.say)

    def note() -> int:
        return stop.note() | saver.note()

    engine.note = note
    with StepProfiler(config.profile, mesh, config.memory_snapshot) as profiler:
        for step in range(first_step, config.max_iters):
            began = time.perf_counter()
            lr = learning_rate(config, step)
            for group in engine.updater.optimizer.param_groups:
                group["lr"] = lr
            report = engine.step(read_batches(config, mesh, train_data, step))
            seconds = time.perf_counter() - began
            last = step + 1 == config.max_iters
            record = {"step": step, **{key: report.metrics[key] for key in ("loss", "aux_loss")}}
            record |= {"grad_norm": report.grad_norm}
            record |= {"lr": lr, "skipped": report.skipped, "loss_scale": report.loss_scale}
            record["tokens_per_s"] = config.tokens_per_step / seconds
            record |= stragglers.update(report.compute_s)
            if config.eval_interval and ((step + 1) % config.eval_interval == 0 or last):
                record |= evaluate(config, mesh, engine, val_data)
            log.write(record, report)
            for line in (stragglers.line, profiler.step()):
                if line:
                    log.say(line)
            check = config.check_replicas and (step + 1) % config.check_replicas == 0
            ending = stop.after(report, first_difference(engine.updater.pieces(counts=True), mesh) if check else "")
            saver.after(report)
            due = last or (config.save_interval and (step + 1) % config.save_interval == 0)
            if ending.saves if ending else due:
                saver.begin(step + 1)
            if ending:
                log.say(ending.why)
                break
    saver.close()
    stop.close()
    log.close()
    if ending is not None and ending.status:
        sys.exit(ending.status)
    if tokenizer is not None and ending is None:
        print(sample(config, engine, tokenizer), flush=True)


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up over warmup_iters, then constant, or a cosine down to min_lr at the last step."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    if config.min_lr is None:
        return config.learning_rate
    progress = (step - config.warmup_iters) / max(1, config.max_iters - 1 - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)
