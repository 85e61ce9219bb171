"""Train a GPT-2 or a mixture of experts, on one process or on any mesh of them.

    python train.py                                                      # embedded corpus, this machine
    torchrun --standalone --nproc_per_node=2 train.py --dp 2
    torchrun --standalone --nproc_per_node=2 train.py --ep 2 --num_experts 8
    torchrun --standalone --nproc_per_node=8 train.py --dp 2 --tp 2 --pp 2 --grad_accum_steps 4 --fused --amp bf16

The flags are those of heiretsu.run.options; `python train.py --help` lists them.
"""

import sys

try:
    from heiretsu.run.options import RunConfig, parse_args, refuse
except ModuleNotFoundError as error:
    sys.exit(f"{error}: install the checkout first, with `pip install -e .` (or `make train`, which makes a .venv)")

# Before torch, whose import takes seconds: a wrong flag is refused at once.
CONFIG = parse_args() if __name__ == "__main__" else None

import contextlib
import json
import math
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from heiretsu.data.batches import TokenDataset, open_data
from heiretsu.data.folder import tokenizer_of
from heiretsu.data.terminal import escape_what_cannot_be_printed
from heiretsu.data.tokenizer import load_tokenizer
from heiretsu.kernels import fused, plain
from heiretsu.model.gpt import GPT
from heiretsu.parallel import checkpoint
from heiretsu.parallel.engine import Engine
from heiretsu.parallel.mesh import Mesh, make_mesh
from heiretsu.parallel.pipeline import Microbatch
from heiretsu.parallel.profiling import StepProfiler
from heiretsu.parallel.replicas import first_difference
from heiretsu.run.agreement import facts
from heiretsu.run.building import build_engine, count_parameters
from heiretsu.run.cpu_memory import keep_freed_memory
from heiretsu.run.device import choose_device
from heiretsu.run.folders import held_folder, make_folders
from heiretsu.run.hosts import gather_hosts, placed_rank
from heiretsu.run.interfaces import use_interface
from heiretsu.run.log import RunLog
from heiretsu.run.resume import Origin, check_changes, find_origin, make_room, named_checkpoint
from heiretsu.run.roll_call import Report
from heiretsu.run.sampling import generate
from heiretsu.run.saved import newest_in
from heiretsu.run.saving import Saver
from heiretsu.run.stop import Stop
from heiretsu.run.stragglers import Stragglers
from heiretsu.run.together import together
from heiretsu.run.tuning import kernel_calls

if fused.HAS_TRITON:
    from heiretsu.kernels.gpu import autotune, launch


def main(config: RunConfig) -> None:
    escape_what_cannot_be_printed()
    rank, backend = placed_rank(os.environ, config.ep, config.pp, config.tp), ""
    try:
        device = find_device(config)
        backend = config.backend_on(device.type)
        if device.type == "cpu":
            keep_freed_memory()
        kernels = fused.describe(device) if config.fused else "plain PyTorch ops"
        make_folders(config, rank)
        resume_from = named_checkpoint(config)
        if config.tokenizer is None:
            config = config.with_tokenizer(tokenizer_of(config.data_dir))
        train_data, val_data = open_data(
            config.data_dir,
            config.model.block_size,
            config.seed,
            config.model.vocab_size,
            config.num_train_chunks,
            config.num_val_chunks,
            config.tokenizer,
            config.vocab_dir,
        )
        use_interface(backend, os.environ)
        runs_on, data = f"{backend} on {device.type}", (train_data, val_data)
        shared = None if config.local_checkpoints else config.checkpoint_dir
        report = Report(facts(config, as_json(config), runs_on, data, resume_from), folder=shared)
    except ValueError as error:
        report = Report(refused=str(error))
    with together(config, backend, rank, report):
        run(config, device, kernels, train_data, val_data)


def run(
    config: RunConfig,
    device: torch.device,
    kernels: str,
    train_data: TokenDataset,
    val_data: TokenDataset,
) -> None:
    """Take the run's folders, build the engine on this rank's mesh, restore it, and train."""
    mesh = make_mesh(config.dp, config.ep, config.pp, config.tp, device)

    def say(line: str) -> None:
        if mesh.rank == 0:
            print(line, flush=True)

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(held_folder(config, mesh, say))
            origin = find_origin(config, mesh, say)
            data = train_data.digest()
            check_changes(config, as_json(config), origin, data, say)
        except ValueError as error:
            refuse(error)
        if config.autotune:
            tune_kernels(config, mesh)
        engine = build_engine(config, mesh, fused if config.fused else plain)
        hosts = gather_hosts(mesh)
        if config.local_checkpoints and not hosts.only_dp_crosses():
            refuse(f"--local_checkpoints: only dp may run between hosts, and here {', '.join(hosts.crossing())} does")
        say("\n".join([describe(config, mesh, train_data, kernels), *hosts.describe()]))
        first_step = restore(config, engine, origin, say)
        train(config, mesh, engine, train_data, val_data, first_step, {"run_id": origin.run_id, "data": data})


def find_device(config: RunConfig) -> torch.device:
    """The device of --device, this rank's own on a machine with several. ValueError if it cannot do what is asked."""
    float64, ranks = config.dtype == "float64", config.num_ranks
    kind = choose_device(config.device, fused=config.fused, float64=float64, amp=config.amp, ranks=ranks)
    if config.amp == "fp16" and kind == "cpu":
        raise ValueError("--amp fp16 needs a GPU, and this run is on the cpu: use --amp bf16, which works there")
    if config.amp == "bf16" and kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("--amp bf16 needs a GPU of compute capability 8.0 or later: use --amp fp16")
    if config.autotune and kind != "cuda":
        raise ValueError(f"--autotune measures Triton kernels and needs a GPU, and this run is on the {kind}")
    if kind != "cuda":
        return torch.device(kind)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ValueError(f"local rank {local_rank} has no GPU: this machine has {gpus}, and each rank needs its own")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def tune_kernels(config: RunConfig, mesh: Mesh) -> None:
    """--autotune: rank 0 measures while the others wait, and every rank launches what it chose."""
    if mesh.rank == 0 and mesh.world.size > 1:
        print(f"autotune: rank 0 measures for all {mesh.world.size} ranks, which wait for it", flush=True)
    chosen = [autotune.tune(kernel_calls(config, mesh, fused), mesh.device) if mesh.rank == 0 else None]
    if mesh.world.size > 1:
        dist.broadcast_object_list(chosen, src=0)
    launch.CHOSEN.update(chosen[0])
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()  # the training's blocks have other sizes


def restore(config: RunConfig, engine: Engine, origin: Origin, say: Callable[[str], None]) -> int:
    """Load a checkpoint into the engine, or the parameters of --init_from; returns the step to go on with."""
    first_step = 0
    try:
        if origin.path is not None:
            first_step = checkpoint.load(origin.path, engine, as_json(config), verified=True)
            left = "" if first_step < config.max_iters else ": nothing is left to do"
            say(f"resumed {origin.path}: {first_step} of {config.max_iters} steps are done{left}")
        elif config.init_from:
            path = newest_in(config.init_from, say, engine.mesh)
            checkpoint.load_parameters(path, engine, as_json(config), verified=True)
            say(f"parameters of {path}")
        make_room(config, engine.mesh, origin, first_step, say)
    except ValueError as error:
        refuse(error)
    return first_step


def as_json(config: RunConfig) -> dict:
    return json.loads(config.to_json())


def train(
    config: RunConfig,
    mesh: Mesh,
    engine: Engine,
    train_data: TokenDataset,
    val_data: TokenDataset,
    first_step: int = 0,
    facts: dict[str, str] | None = None,
) -> None:
    """The loop: a step, its log line, and now and then an evaluation or a checkpoint. facts: for the checkpoints."""
    tokenizer = find_tokenizer(config, mesh)  # now, so that nothing is learned at the end of a long run
    facts = facts or {}
    log, stop, ending = RunLog(config, mesh, first_step, facts.get("run_id")), Stop(config), None
    stragglers, saver = Stragglers(mesh), Saver(config, engine, as_json(config), facts, log.say)

    def note() -> int:
        return stop.note() | saver.note()

    engine.note = note
    with StepProfiler(config.profile, mesh, config.memory_snapshot) as profiler:
        for step in range(first_step, config.max_iters):
            began = time.perf_counter()
            lr = learning_rate(config, step)
            for group in engine.optimizer.param_groups:
                group["lr"] = lr
            report = engine.step(read_batches(config, mesh, train_data, step))
            seconds = time.perf_counter() - began
            last = step + 1 == config.max_iters
            record = {"step": step, "loss": report.loss, "aux_loss": report.aux_loss, "grad_norm": report.grad_norm}
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
            ending = stop.after(report, first_difference(engine) if check else "")
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


def read_batches(config: RunConfig, mesh: Mesh, data: TokenDataset, step: int) -> list[Microbatch]:
    """This replica's microbatches of a step. Sample i of the global batch is the same on every topology."""
    first = mesh.replica.index * config.grad_accum_steps * config.batch_size
    batches = []
    for microbatch in range(config.grad_accum_steps):
        start = first + microbatch * config.batch_size
        inputs, targets = data.batch(step, range(start, start + config.batch_size))
        batches.append(Microbatch(inputs.to(mesh.device), targets.to(mesh.device), start, step))
    return batches


def evaluate(config: RunConfig, mesh: Mesh, engine: Engine, data: TokenDataset) -> dict[str, float]:
    """Mean loss over the first eval_iters global batches of the validation windows."""
    total = 0.0
    for iteration in range(config.eval_iters):
        first = iteration * config.global_batch_size + mesh.replica.index * config.grad_accum_steps * config.batch_size
        batches = []
        for microbatch in range(config.grad_accum_steps):
            start = first + microbatch * config.batch_size
            inputs, targets = data.eval_batch(range(start, start + config.batch_size))
            batches.append(Microbatch(inputs.to(mesh.device), targets.to(mesh.device), start))
        total += engine.evaluate(batches)
    loss = total / config.eval_iters
    bits = {} if data.bytes_per_token is None else {"eval_bits_per_byte": loss / math.log(2) / data.bytes_per_token}
    return {"eval_loss": loss, **bits}


def describe(config: RunConfig, mesh: Mesh, data: TokenDataset, kernels: str) -> str:
    """What is about to run, and the whole configuration."""
    model = config.model
    experts = ""
    if model.num_experts:
        experts = f", {model.num_experts} experts, top {model.top_k}, every {model.moe_freq} layers"
    schedule = f", {config.schedule} over {config.grad_accum_steps} microbatches" if config.pp > 1 else ""
    if config.stages_per_rank > 1:
        schedule += f", {config.stages_per_rank} stages a rank"
    lines = [
        f"config: {config.to_json()}",
        f"model: {count_parameters(model):,} parameters, {model.n_layer} layers, {model.n_head} heads, "
        f"{model.n_embed} wide, vocabulary {model.vocab_size}, block {model.block_size}{experts}",
        f"mesh: dp {config.dp} x ep {config.ep} x pp {config.pp} x tp {config.tp} on {mesh.device.type}{schedule}",
        f"kernels: {kernels}; activations {config.amp if config.amp != 'none' else config.dtype}"
        f"{', compiled' if config.compile else ''}",
        f"data: {config.data_dir or 'embedded corpus'}, {data.num_tokens:,} training tokens ({config.tokenizer})",
        f"batch: {config.global_batch_size} sequences, {config.tokens_per_step:,} tokens; {config.max_iters} steps",
    ]
    return "\n".join(lines)


def find_tokenizer(config: RunConfig, mesh: Mesh):
    """What turns the sample at the end into text; None where there is to be none, or where it cannot be had."""
    if not config.sample_tokens or mesh.world.size > 1:
        return None
    try:
        return load_tokenizer(config.tokenizer, config.vocab_dir)
    except ValueError as error:
        print(f"there will be no sample at the end: {error}", flush=True)
        return None


def sample(config: RunConfig, engine: Engine, tokenizer) -> str:
    """A piece of text by the trained model, after an end-of-text."""
    model = engine.stages[0]
    assert isinstance(model, GPT)
    try:
        tokens = list(generate(model, [tokenizer.eot_token], config.sample_tokens, temperature=0.9, seed=config.seed))
    except ValueError as error:
        return f"there is no sample: {error}"
    return "--- sample ---\n" + tokenizer.decode(tokens) + "\n---"


if __name__ == "__main__":
    main(CONFIG)
