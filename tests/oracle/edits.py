"""Wrong edits of training itself, each of which one test must see.

    python -m tests.oracle.edits            # all of them
    python -m tests.oracle.edits scale      # those with `scale` in their names

Each is made alone in a copy of the tree, where the test that should see it runs; without edits all of them pass.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.mutation.copies import Copy

ROOT = Path(__file__).parents[2]
LONGEST_TEST_S = 400.0

ORACLE = "tests/oracle/test_oracle.py"
DENSE = f"{ORACLE}::test_a_dense_run_takes_the_steps_of_the_run_by_hand"
MIXTURE = f"{ORACLE}::test_a_fused_mixture_takes_the_steps_of_the_run_by_hand"
STORED = f"{ORACLE}::test_every_checkpoint_has_the_parameters_and_moments_of_the_run_by_hand"
SKIPPED = f"{ORACLE}::test_a_skipped_step_changes_nothing_but_the_scale"
RATES = f"{ORACLE}::test_the_learning_rate_is_what_the_flags_say_at_steps_worked_out_by_hand"
FIRST_STEPS = f"{ORACLE}::test_adamw_takes_its_first_two_steps_as_loshchilov_and_hutter_write_them"
BITS = f"{ORACLE}::test_bits_per_byte_are_the_loss_in_bits_over_the_bytes_of_a_token"
RESUMED = f"{ORACLE}::test_a_run_resumed_on_a_mesh_goes_on_as_by_hand"
OTHER_SIZE = "tests/parallel/test_checkpoint.py::test_every_size_that_differs_is_refused_by_name_though_the_shapes_fit"
FLOPS = "tests/model/test_gpt.py::test_flops_are_those_that_torch_counts_but_for_the_future_that_attention_masks"
INITIAL = "tests/model/test_gpt.py::test_initial_values_are_gpt2s"
MFU = "tests/run/test_log.py::test_mfu_of_gpt2_on_one_gpu_and_on_eight_is_what_data_sheet_and_paper_give"
SCALER = "tests/parallel/test_updater.py::test_the_scale_moves_as_torchs_gradscaler_moves_it"
SHARDS = "tests/parallel/test_placement.py::test_a_dim_is_dealt_out_as_torch_chunk_and_so_a_checkpoint_deals_it_out"
LARGE = "tests/parallel/test_tensor.py::test_shards_of_logits_of_ten_thousand_make_the_whole_loss"
OVERLAP = "tests/parallel/test_tensor.py::test_the_weights_gradient_is_computed_while_dx_is_being_summed"
BUCKETS = "tests/parallel/test_data.py::test_each_bucket_is_sent_once_a_step_and_most_before_backward_ends"
SAMPLES = "tests/run/test_sampling.py::test_tokens_come_as_often_as_the_softmax_of_the_divided_logits_says[0.5-None]"
DRAWN = "tests/bench/test_plot_schedule.py::test_bars_stand_where_the_clock_says_and_panels_share_its_scale"
SPEED = "tests/test_train.py::test_tokens_per_second_are_those_of_the_whole_batch"


@dataclass(frozen=True)
class Edit:
    """`old`, which occurs once in `file`, becomes `new`; the test `seen_by` then fails."""

    name: str
    file: str
    old: str
    new: str
    seen_by: str


def kind(name: str) -> str:
    return f"{ORACLE}::test_every_kind_of_run_takes_the_steps_of_the_run_by_hand[{name}]"


def other(name: str) -> str:
    return f"{ORACLE}::test_other_flags_are_taken_as_by_hand[{name}]"


EDITS = [
    Edit(
        "the learning rate starts again on resume",
        "run/training.py",
        "lr = learning_rate(config, step)",
        "lr = learning_rate(config, step - first_step)",
        RESUMED,
    ),
    Edit(
        "warm-up a step late",
        "run/training.py",
        "* (step + 1) / config.warmup_iters",
        "* step / config.warmup_iters",
        RATES,
    ),
    Edit(
        "the cosine reaches min_lr a step late",
        "run/training.py",
        "config.max_iters - 1 - config.warmup_iters",
        "config.max_iters - config.warmup_iters",
        RATES,
    ),
    Edit("the scale is never updated", "parallel/updater.py", "self.scaler.update(skipped)", "pass", DENSE),
    Edit(
        "gradients are not unscaled before AdamW",
        "parallel/updater.py",
        "factor /= self.scaler.scale",
        "factor /= 1.0",
        f"{STORED}[dense]",
    ),
    Edit(
        "the clip factor squared",
        "parallel/updater.py",
        "self.grad_clip / (norm + 1e-6))",
        "(self.grad_clip / (norm + 1e-6)) ** 2)",
        f"{STORED}[dense]",
    ),
    Edit("evaluation with dropout on", "parallel/engine.py", ".eval()", ".train()", DENSE),
    Edit(
        "weight decay on biases and norms",
        "parallel/updater.py",
        '{"params": others, "weight_decay": 0.0}',
        '{"params": others}',
        FIRST_STEPS,
    ),
    Edit(
        "an overflow leaves the run of good steps",
        "parallel/updater.py",
        "max(self.scale / 2, 1.0), 0",
        "max(self.scale / 2, 1.0), self.good_steps",
        DENSE,
    ),
    Edit(
        "the scale's good steps are not saved",
        "parallel/updater.py",
        "asdict(self.scaler)}",
        'asdict(self.scaler) | {"good_steps": 0}}',
        RESUMED,
    ),
    Edit(
        "the scale is not restored",
        "parallel/updater.py",
        'if facts["scaler"]["growth"] == self.scaler.growth:',
        "if False:",
        RESUMED,
    ),
    Edit(
        "a checkpoint of another n_head is accepted",
        "run/state.py",
        'MAY_CHANGE = ("dropout",',
        'MAY_CHANGE = ("n_head", "dropout",',
        OTHER_SIZE,
    ),
    Edit(
        "residual projections are not drawn smaller with depth",
        "model/gpt.py",
        "INIT_STD / math.sqrt(2 * config.n_layer)",
        "INIT_STD",
        f"{INITIAL}[0]",
    ),
    Edit("2 FLOPs a parameter and token", "model/config.py", "return 6 * (", "return 2 * (", f"{FLOPS}[dense]"),
    Edit(
        "one GPU's peak for the whole world",
        "run/log.py",
        "sheet.bf16_flops * mesh.world.size",
        "sheet.bf16_flops",
        MFU,
    ),
    Edit(
        "shards' lse combined without the maximum",
        "parallel/tensor.py",
        "largest = all_reduce(lse, self.tp, dist.ReduceOp.MAX)",
        "largest = torch.zeros_like(lse)",
        LARGE,
    ),
    Edit("shard bounds rounded down", "parallel/placement.py", "-(-size // axis.size)", "size // axis.size", SHARDS),
    # Seen to go unseen
    Edit(
        "sampling multiplies by the temperature",
        "run/sampling.py",
        "/ max(temperature, 1e-30)",
        "* max(temperature, 1e-30)",
        SAMPLES,
    ),
    Edit(
        "dx is summed before the weight's gradient",
        "parallel/tensor.py",
        "dweight = dy",
        "pending.wait()\n        dweight = dy",
        OVERLAP,
    ),
    Edit(
        "a bucket's sum is waited for at once",
        "parallel/data.py",
        "bucket.work = dist.all_reduce(bucket.flat, group=bucket.axis.group, async_op=True)",
        "dist.all_reduce(bucket.flat, group=bucket.axis.group, async_op=True).wait()",
        BUCKETS,
    ),
    Edit(
        "a timeline is drawn to another scale",
        "bench/plot_schedule.py",
        "panel.set_xlim(0, longest)",
        "panel.set_xlim(0, 2 * longest)",
        DRAWN,
    ),
    Edit(
        "a bar is drawn longer than its action",
        "bench/plot_schedule.py",
        "end - start, left",
        "end + start, left",
        DRAWN,
    ),
    # What else the oracle and its neighbours judge
    Edit(
        "the balance loss is weighed twice",
        "model/gpt.py",
        "objective = self.config.aux_loss_coef * metrics",
        "objective = 2 * self.config.aux_loss_coef * metrics",
        MIXTURE,
    ),
    Edit(
        "the balance loss counts its tokens for one expert each",
        "model/moe.py",
        "chosen.mean(1) / experts.shape[2]",
        "chosen.mean(1)",
        MIXTURE,
    ),
    Edit(
        "masks depend on the sample within its microbatch",
        "run/batches.py",
        "Context(step, start)",
        "Context(step, 0)",
        DENSE,
    ),
    Edit("every step reads the first step's tokens", "run/batches.py", "data.batch(step, ", "data.batch(0, ", DENSE),
    Edit(
        "evaluation stops a batch early",
        "run/batches.py",
        "for iteration in range(config.eval_iters):",
        "for iteration in range(config.eval_iters - 1):",
        DENSE,
    ),
    Edit("bits are nats", "run/batches.py", "loss / math.log(2) / data", "loss / data", BITS),
    Edit(
        "the second moment decays as the first",
        "run/building.py",
        "betas=config.betas",
        "betas=(config.betas[0],) * 2",
        FIRST_STEPS,
    ),
    Edit(
        "good steps are counted past the window",
        "parallel/updater.py",
        "self.scale * 2, 0",
        "self.scale * 2, 1",
        SCALER,
    ),
    Edit(
        "tokens a second of one microbatch",
        "run/config.py",
        "self.batch_size * self.grad_accum_steps * self.replicas",
        "self.batch_size * self.replicas",
        SPEED,
    ),
    # One for each kind of run that the oracle repeats
    Edit(
        "the router does not decay",
        "model/moe.py",
        "weight=Spec(shape, partial_over=REPLICAS, std=INIT_STD, decay=True)",
        "weight=Spec(shape, partial_over=REPLICAS, std=INIT_STD)",
        f"{STORED}[mixture]",
    ),
    Edit("a step that overflowed is taken", "parallel/updater.py", "if not skipped:", "if True:", SKIPPED),
    Edit("a GELU of the CPU forms' own", "kernels/cpu/gelu.py", "0.044715 *", "0.0447 *", kind("dense fused")),
    Edit(
        "two replicas' gradients are not averaged",
        "parallel/data.py",
        "if divisor > 1:",
        "if divisor > 2:",
        kind("dense fused on all axes"),
    ),
    Edit(
        "only a rank's first stage is trained",
        "run/building.py",
        "params = {name: param for stage in stages for",
        "params = {name: param for stage in stages[:1] for",
        kind("dense interleaved"),
    ),
    Edit(
        "the copies of the tied embedding go apart",
        "parallel/tensor.py",
        'shared_over="ends"',
        "shared_over=None",
        kind("dense gpipe, resumed"),
    ),
    Edit(
        "gates do not sum to one",
        "kernels/plain.py",
        "probs / probs.sum(-1, keepdim=True)",
        "probs / 1.0",
        kind("mixture plain"),
    ),
    Edit(
        "an expert's bias on every tp rank",
        "model/moe.py",
        "float(tp.index == 0)",
        "float(tp.index >= 0)",
        kind("mixture on all axes"),
    ),
    Edit(
        "ep ranks read one batch",
        "run/batches.py",
        "mesh.replica.index",
        "mesh.dp.index",
        kind("mixture fused, resumed"),
    ),
    Edit(
        "a grad_clip of 0 clips to 0",
        "parallel/updater.py",
        "if self.grad_clip > 0 else",
        "if self.grad_clip >= 0 else",
        other("no clipping, no decay, other betas"),
    ),
    Edit(
        "no two layers in a row are mixtures",
        "model/config.py",
        "% self.moe_freq == 0",
        "% max(2, self.moe_freq) == 0",
        other("one microbatch, every layer a mixture of one"),
    ),
]


def apply(edit: Edit, source: str) -> str:
    """The edited file. ValueError if the text to be replaced is not there, or not once."""
    if source.count(edit.old) != 1:
        raise ValueError(f"{edit.name}: {edit.old!r} occurs {source.count(edit.old)} times in {edit.file}, not once")
    return source.replace(edit.old, edit.new)


def main(names: list[str]) -> int:
    chosen = [edit for edit in EDITS if not names or any(name in edit.name for name in names)]
    sources = {edit.file: (ROOT / edit.file).read_text() for edit in chosen}
    missed = 0
    with Copy(ROOT, patience_s=LONGEST_TEST_S, marks="") as copy:
        for test in dict.fromkeys(edit.seen_by for edit in chosen):
            verdict = copy.run({test.partition("::")[0]: [test]})
            if verdict["verdict"] != "green" or list(verdict["seconds"]) != [test]:
                print(f"NOT GREEN without an edit, or not there: {test} {verdict['why']}", flush=True)
                missed += 1
        for edit in chosen:
            files = {edit.file: apply(edit, sources[edit.file])}
            verdict = copy.run({edit.seen_by.partition("::")[0]: [edit.seen_by]}, files)
            seen = verdict["verdict"] in ("red", "hung")
            missed += not seen
            print(f"{'seen' if seen else 'MISSED'}: {edit.name}: {edit.seen_by.partition('::')[2]}", flush=True)
            print(f"    {verdict['why'][:160]}", flush=True)
    print(f"{len(chosen)} edits, {missed} missed")
    return int(missed > 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
