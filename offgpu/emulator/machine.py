"""The scheduler: runs the CTAs of a launch, a batch at a time, block by block under lane masks.

A batch keeps, for each block, the mask of lanes that are about to run it. Lanes part at a branch and meet again when
they reach the same block, because the lowest block always goes first ("lockstep"). The "random" schedule runs one
warp at a time instead, in random order with random pre-emption, so that orders which hardware may take are tried too.
Lanes at a barrier wait until their whole CTA is there.
"""

import re
import time

import numpy as np

from heiretsu.offgpu.emulator import arithmetic, operations  # noqa: F401  (register their handlers)
from heiretsu.offgpu.emulator.batch import WARP, WARPGROUP, Batch
from heiretsu.offgpu.emulator.memory import Memory
from heiretsu.offgpu.emulator.numerics import UNSIGNED
from heiretsu.offgpu.emulator.parser import Kernel, parse
from heiretsu.offgpu.emulator.report import PTXError, Report, Unsupported
from heiretsu.offgpu.emulator.translate import Translator, translate
from heiretsu.offgpu.emulator.warp import WarpUnit

SCHEDULES = ("lockstep", "random")
PREEMPTION = 0.02  # chance that a random schedule changes the warp after a block
FAIRNESS = 512  # every so many blocks, lockstep lets another group of lanes go first: spin loops end


class Machine:
    """One launch of one kernel. `memory`, `warps` and `batch` are what the translated code works on."""

    def __init__(self, kernel: Kernel, args, grid, shared_bytes, num_warps, check, schedule, seed, report, limit):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r}: choose one of {SCHEDULES}")
        self.kernel, self.grid, self.report, self.limit = kernel, grid, report, limit
        self.rng, self.random = np.random.default_rng(seed), schedule == "random"
        self.threads = num_warps * WARP
        num_ctas = grid[0] * grid[1] * grid[2]
        self.memory = Memory(kernel, args, shared_bytes, num_ctas, check, report, self.rng, self.random)
        self.instructions = self.lane_instructions = 0
        self.ran: set[int] = set()  # blocks

    def run_batch(self, ctas):
        self.batch = Batch(ctas, self.grid, self.threads)
        self.memory.start(self.batch)
        self.warps = WarpUnit(self.kernel, self.batch, self.memory, self.report)
        self.registers = [_undefined(register.bits) for register in self.kernel.registers.values()]
        self.ready = {0: np.ones(self.batch.num_lanes, np.bool_)}  # block -> lanes about to run it
        self.waiting: dict[tuple, np.ndarray] = {}  # (next block, barrier, count) -> lanes at the barrier
        self.exited = np.zeros(self.batch.num_lanes, np.bool_)
        self.focus, steps = None, 0
        while self.ready or self.waiting:
            if not self.ready:
                self._release_barriers(force=True)
                continue
            steps += 1
            picked = self._pick_warp() if self.random else self._pick_lowest(steps)
            if picked is None:
                continue
            block, mask = picked
            rest = self.ready.pop(block)
            if mask is not rest:
                self._add(self.ready, block, rest & ~mask)
            self._run_block(block, mask)
            if self.waiting:
                self._release_barriers(force=False)
            if self.limit and self.instructions > self.limit:
                raise PTXError(f"more than {self.limit} instructions (endless loop?)")

    # ---- choosing what runs next

    def _pick_lowest(self, steps):
        block = min(self.ready)
        if steps % FAIRNESS == 0 and len(self.ready) > 1:
            other = self.rng.choice([b for b in self.ready if b != block])
            here = self.ready[other].reshape(-1, WARP)
            whole = (here | self.exited.reshape(-1, WARP)).all(1) & here.any(1)
            if whole.any():
                return other, self.ready[other] & np.repeat(whole, WARP)
        return block, self.ready[block]

    def _pick_warp(self):
        """The lowest block of the warp in focus; None if that warp has to wait for its warpgroup."""
        if self.focus is None or self.rng.random() < PREEMPTION or not self._is_ready(self.focus):
            live = np.logical_or.reduce(list(self.ready.values()))
            self._focus_on(self.rng.choice(np.unique(self.batch.warp[live])))
        block = min(b for b, mask in self.ready.items() if mask[self.focus].any())
        lanes = self.focus
        if block in self.kernel.warpgroup_blocks:
            start = lanes.start // WARPGROUP * WARPGROUP
            lanes = slice(start, start + WARPGROUP)
            here = self.ready[block][lanes] | self.exited[lanes]
            if not here.all():  # run a warp of the group that has not come here yet
                self._focus_on((start + int(np.flatnonzero(~here)[0])) // WARP)
                if not self._is_ready(self.focus):
                    raise PTXError("deadlock: part of a warpgroup at wgmma, part at a barrier")
                return None
        mask = np.zeros(self.batch.num_lanes, np.bool_)
        mask[lanes] = self.ready[block][lanes]
        return block, mask

    def _focus_on(self, warp):
        self.focus = slice(warp * WARP, warp * WARP + WARP)

    def _is_ready(self, lanes):
        return any(mask[lanes].any() for mask in self.ready.values())

    @staticmethod
    def _add(masks, key, mask):
        if mask.any():
            masks[key] = masks[key] | mask if key in masks else mask

    # ---- running a block

    def _run_block(self, block, mask):
        full = not self.exited.any() and bool(mask.all())
        function = translate(self.kernel, block, not full)
        self.ran.add(block)
        size = len(self.kernel.blocks[block])
        self.instructions += size
        self.lane_instructions += size * int(mask.sum())
        with np.errstate(all="ignore"):
            outcome = function(self.registers, self, None if full else mask)
        if outcome is None:
            if block + 1 < len(self.kernel.blocks):
                self._add(self.ready, block + 1, mask)
            else:
                self.exited = self.exited | mask
        elif outcome[0] == "bra":
            _, target, taken = outcome
            if taken is True:
                self._add(self.ready, target, mask)
            else:
                self._add(self.ready, target, mask & taken)
                self._add(self.ready, block + 1, mask & ~taken)
        elif outcome[0] == "exit":
            leaving = mask if outcome[1] is True else mask & outcome[1]
            self.exited = self.exited | leaving
            self._add(self.ready, block + 1, mask & ~leaving)
        else:
            _, barrier, count = outcome
            self._add(self.waiting, (block + 1, barrier, 0 if count == self.threads else count), mask)

    # ---- barriers

    def _release_barriers(self, force):
        """Let the CTAs pass whose threads have all arrived; force: nothing else can run, so let anyone pass."""
        released = False
        for barrier, count in {(barrier, count) for _, barrier, count in self.waiting}:
            arrived = np.logical_or.reduce([mask for key, mask in self.waiting.items() if key[1] == barrier])
            for slot in range(self.batch.num_ctas):
                lanes = slice(slot * self.threads, (slot + 1) * self.threads)
                here = int(arrived[lanes].sum())
                needed = count or self.threads - int(self.exited[lanes].sum())
                if not here or (here < needed and not force):
                    continue
                if here < needed or (not count and needed < self.threads):
                    text = f"barrier {barrier} passed by {here} of {self.threads} threads"
                    self.report.add("divergence", "bar.sync", text)
                self.batch.epoch[slot] += 1
                self._pass_barrier(barrier, lanes)
                released = True
        if force and not released:
            raise PTXError("deadlock at a barrier")

    def _pass_barrier(self, barrier, lanes):
        for key in [key for key in self.waiting if key[1] == barrier]:
            passing = np.zeros(self.batch.num_lanes, np.bool_)
            passing[lanes] = self.waiting[key][lanes]
            if passing.any():
                self._add(self.ready, key[0], passing)
                self.waiting[key] = self.waiting[key] & ~passing
                if not self.waiting[key].any():
                    del self.waiting[key]

    # ---- called by translated code

    def fail_assertion(self, mask, line):
        where = self.kernel.where(line)
        self.report.add("assert", where, "device_assert failed", self.batch.active(mask).size)
        raise PTXError(f"device assert at {where}")

    def unsupported_call(self, name):
        raise Unsupported(f"call {name}")


def _undefined(bits):
    """What a register holds before anything is written to it."""
    return np.bool_(False) if bits == 1 else UNSIGNED[bits](0xDEADDEADDEADDEAD & ((1 << bits) - 1))


def execute(
    ptx: str,
    grid,
    args,
    shared: int = 0,
    num_warps: int = 4,
    name: str | None = None,
    check: bool = True,
    schedule: str = "lockstep",
    batch: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    report: Report | None = None,
    exact: bool = False,
) -> Report:
    """Run one kernel of a PTX module.

    args: CPU tensors (changed in place), ints, floats or bytes, in the order of the kernel's parameters; exact: there
    must be one for each. shared: bytes of extern shared memory. check=False leaves out the race checks. batch: CTAs
    that run together. limit: stop after so many instructions.
    """
    report = Report() if report is None else report
    kernels = parse(ptx)
    kernel = kernels[name] if name else next(iter(kernels.values()))
    if len(args) > len(kernel.parameters) or (exact and len(args) != len(kernel.parameters)):
        raise PTXError(f"{len(args)} arguments for the {len(kernel.parameters)} parameters of {kernel.name}")
    grid = tuple(int(g) for g in grid) + (1,) * (3 - len(grid))
    num_ctas = grid[0] * grid[1] * grid[2]
    start = time.time()
    machine = Machine(kernel, args, grid, shared, num_warps, check, schedule, seed, report, limit)
    if batch is None:  # CTAs that wait for each other run one after another
        waits = any(re.match(r"(atom.*\.cas|ld\.\w*\.?acquire)", opcode) for opcode in kernel.opcodes)
        lanes = 512 if machine.random else 4096  # NumPy's best sizes: one warp is active at a time, or all of them
        batch = 1 if waits else max(1, min(16, lanes // machine.threads))
    order = list(range(num_ctas))
    if machine.random:
        machine.rng.shuffle(order)
    try:
        for i in range(0, num_ctas, batch):
            machine.run_batch(order[i : i + batch])
    finally:
        machine.memory.write_back()
    seconds = time.time() - start
    report.stats = dict(
        kernel=kernel.name,
        seconds=seconds,
        ctas=num_ctas,
        sec_per_cta=seconds / max(num_ctas, 1),
        instructions=machine.instructions,
        lane_instructions=machine.lane_instructions,
        opcodes=sorted(kernel.opcodes),
        **_coverage(machine),
    )
    return report


def _coverage(machine):
    """Share of the kernel's instructions that ran, and the source lines of blocks that never did."""
    kernel, ran = machine.kernel, machine.ran
    total = sum(map(len, kernel.blocks))
    hit = sum(len(kernel.blocks[b]) for b in ran)
    ran_lines = {i.line for b in ran for i in kernel.blocks[b]}
    other_lines = {i.line for b, block in enumerate(kernel.blocks) if b not in ran for i in block if i.line[1]}
    return dict(coverage=hit / max(total, 1), unrun=sorted(kernel.where(line) for line in other_lines - ran_lines))


def unsupported(ptx: str) -> list[str]:
    """Opcodes of a PTX module that the emulator cannot execute; empty: all translate."""
    missing = set()
    for kernel in parse(ptx).values():
        for instruction in (i for block in kernel.blocks for i in block):
            try:
                Translator(kernel, masked=False).instruction(instruction)
            except Exception:
                missing.add(instruction.opcode)
    return sorted(missing)
