"""The run itself, on one process in float64: data, accumulation, loss scale, clipping, AdamW, schedule, evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F

from tests.oracle.draws import Text
from tests.oracle.models import Mixture, Place, build


@dataclass(frozen=True)
class Run:
    """What train.py is asked for, by the names of its flags; batch_size is that of one replica."""

    n_layer: int = 4
    n_head: int = 4
    n_embed: int = 16
    block_size: int = 16
    dropout: float = 0.0
    num_experts: int = 0
    top_k: int = 2
    moe_freq: int = 2
    aux_loss_coef: float = 0.01
    batch_size: int = 4
    grad_accum_steps: int = 2
    max_iters: int = 12
    learning_rate: float = 1e-3
    warmup_iters: int = 0
    min_lr: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    loss_scale: float | None = None
    loss_scale_window: int = 2000
    eval_interval: int = 0
    eval_iters: int = 2
    seed: int = 1337

    def flags(self, replicas: int = 1) -> list[str]:
        """The command line of this run, its batch dealt out to so many data replicas."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["batch_size"] //= replicas
        values["betas"] = " ".join(map(str, self.betas))
        given = [f"--{name} {value}" for name, value in values.items() if value is not None]
        return " ".join(given).split()


@dataclass
class History:
    """What happened. records[step]: as in train.py's log; a skipped step's grad_norm is not finite. tensors[n]: as in
    the checkpoint after n steps, by name; moments exist once a step has not been skipped."""

    records: list[dict] = field(default_factory=list)
    tensors: list[dict[str, torch.Tensor]] = field(default_factory=list)


def learning_rate(run: Run, step: int) -> float:
    """Linear warm-up (Goyal et al. 2017), then a cosine (Loshchilov and Hutter 2017, eq. 5) that ends on min_lr."""
    if step < run.warmup_iters:
        return run.learning_rate * (step + 1) / run.warmup_iters
    if run.min_lr is None:
        return run.learning_rate
    last, since = run.max_iters - 1 - run.warmup_iters, step - run.warmup_iters
    return run.min_lr + (run.learning_rate - run.min_lr) * (1 + math.cos(math.pi * since / last)) / 2


def train(run: Run, training: Text, validation: Text, bytes_per_token: float) -> History:
    """Every step of the run, and every state between them."""
    place = Place(run.seed)
    model, parameters = build(run, place)
    groups = [
        {"params": [p.ours for p in parameters if p.decays], "weight_decay": run.weight_decay},
        {"params": [p.ours for p in parameters if not p.decays], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=run.betas, eps=1e-8, foreach=False)
    scale, good_steps = run.loss_scale or 1.0, 0
    sequences = run.batch_size * run.grad_accum_steps
    history = History(tensors=[_state(parameters, optimizer)])

    for step in range(run.max_iters):
        lr = learning_rate(run, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        optimizer.zero_grad()
        losses, balances = [], []
        for first in range(0, sequences, run.batch_size):
            place.step, place.first_sample = step, first
            windows = training.training_windows(run.seed, step, range(first, first + run.batch_size))
            loss, balance = _losses(model, windows)
            objective = loss + run.aux_loss_coef * balance
            (objective * (scale / run.grad_accum_steps)).backward()
            losses.append(loss.item())
            balances.append(balance.item())
        gradients = [p.ours.grad for p in parameters]
        skipped = not torch.nn.utils.get_total_norm(gradients).isfinite()
        record = {"step": step, "lr": lr, "skipped": skipped, "loss_scale": scale, "grad_norm": math.nan}
        record |= {"loss": sum(losses) / len(losses), "aux_loss": sum(balances) / len(balances)}
        if not skipped:
            for gradient in gradients:
                gradient /= scale
            clip = run.grad_clip if run.grad_clip else math.inf
            record["grad_norm"] = torch.nn.utils.clip_grad_norm_([p.ours for p in parameters], clip).item()
            optimizer.step()
        if run.loss_scale:  # torch.amp.GradScaler's rule
            good_steps = 0 if skipped else good_steps + 1
            if skipped:
                scale *= 0.5
            elif good_steps == run.loss_scale_window:
                scale, good_steps = scale * 2, 0
        done = step + 1
        if run.eval_interval and (done % run.eval_interval == 0 or done == run.max_iters):
            loss = evaluate(run, model, validation)
            record |= {"eval_loss": loss, "eval_bits_per_byte": loss / math.log(2) / bytes_per_token}
        history.records.append(record)
        history.tensors.append(_state(parameters, optimizer))
    return history


def _losses(model, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy, and the balance loss: a mean over sequences and mixture layers, 0 in a dense model."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    balances = [module.balance.mean() for module in model.modules() if isinstance(module, Mixture)]
    return loss, torch.stack(balances).mean() if balances else torch.zeros((), dtype=loss.dtype)


@torch.no_grad()
def evaluate(run: Run, model, validation: Text) -> float:
    """Mean loss, without dropout, of the first eval_iters global batches."""
    model.eval()
    windows = validation.evaluation_windows(range(run.eval_iters * run.batch_size * run.grad_accum_steps))
    return _losses(model, windows)[0].item()


def _state(parameters, optimizer) -> dict[str, torch.Tensor]:
    state = {f"model/{p.name}": p.published(p.ours) for p in parameters}
    for moment in ("exp_avg", "exp_avg_sq"):
        for p in parameters:
            if optimizer.state[p.ours]:
                state[f"{moment}/{p.name}"] = p.published(optimizer.state[p.ours][moment])
    return state
