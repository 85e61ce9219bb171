"""How many bytes a run needs on one rank: counted from its sizes alone, before anything is built or torch imported.

The rank with the most layers is counted. Parameters, gradients, moments and tokens are what they are; activations are
an estimate of what backward needs kept, to within a factor of two or so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from heiretsu.parallel.schedules import SCHEDULES
from heiretsu.run.config import RunConfig

LARGEST_GPU_BYTES = 288 * 2**30  # of one GPU that can be bought (B300, MI355X); which one it is, nobody knows yet
_ACTION_BYTES = 500  # of a microbatch in the lists of a schedule, at least


@dataclass(frozen=True)
class Bytes:
    """Of one rank. tokens: inputs and targets of all microbatches of a step."""

    parameters: int
    gradients: int
    moments: int
    tokens: int
    activations: int

    @property
    def state(self) -> int:
        """What a rank holds from one step to the next."""
        return self.parameters + self.gradients + self.moments

    @property
    def certain(self) -> int:
        return self.state + self.tokens

    @property
    def total(self) -> int:
        return self.certain + self.activations


def bytes_of_a_rank(config: RunConfig) -> Bytes:
    """AdamW's run of this configuration, on the mesh that it names."""
    model, C, tp = config.model, config.model.n_embed, config.tp
    wide = 8 if config.dtype == "float64" else 4
    narrow = 2 if config.amp != "none" else wide

    layers = -(-model.n_layer // config.pp)
    mixtures = -(-(model.n_layer // model.moe_freq) // config.pp) if model.num_experts else 0
    elements = mixtures * model.block_parameters(True, config.ep, tp) if mixtures else 0
    elements += (layers - mixtures) * model.block_parameters(False, config.ep, tp)
    elements += model.padded_vocab_size * C // tp + (model.block_size + 2) * C
    parameters = elements * wide

    tokens = config.batch_size * model.block_size  # of a microbatch
    served = model.top_k if model.num_experts else 1
    kept = 5 * C + (4 * C + 2 * served * model.ffn_size) // tp  # elements of a token in a layer
    if not config.fused:
        kept += 2 * model.n_head * model.block_size // tp  # scores and probabilities
    keeps_all = SCHEDULES[config.schedule].keeps_all
    in_flight = config.grad_accum_steps if keeps_all else min(config.pp, config.grad_accum_steps)
    logits = 0 if config.fused else 2 * tokens * model.padded_vocab_size // tp * 4
    activations = tokens * kept * narrow * layers * in_flight + logits

    microbatches = config.grad_accum_steps * (2 * 8 * tokens + _ACTION_BYTES)
    return Bytes(parameters, parameters, 2 * parameters, microbatches, activations)


def check_memory(config: RunConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ValueError for a run that is far from fitting: by what is certain, or by four times with the estimate."""
    need, on_host = bytes_of_a_rank(config), host_bytes() // int(environment.get("LOCAL_WORLD_SIZE", 1))
    if config.device == "cpu":
        room, whose = on_host, "this machine has"
    else:
        room, whose = max(on_host, LARGEST_GPU_BYTES), "the largest device has"
    if need.certain <= room and need.total <= 4 * room:
        return
    model = config.model
    parts = ", ".join(f"{name} {_words(getattr(need, name))}" for name in Bytes.__dataclass_fields__)
    raise ValueError(
        f"--n_layer {model.n_layer} --n_embed {model.n_embed} --num_experts {model.num_experts} --block_size "
        f"{model.block_size} --batch_size {config.batch_size} --grad_accum_steps {config.grad_accum_steps} need "
        f"{_words(need.total)} a rank ({parts}), and {whose} {_words(room)} for each: take less, or more ranks"
    )


def host_bytes() -> int:
    """Memory of this machine, or of the container where it is held to less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical


def _words(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} EiB"
