"""The compile audit: what the public ops launch, compiled ahead of time and read back, without a GPU.

The ops are called on CPU tensors, forward and backward, and their launches recorded as Triton specialises them for an
architecture. Each is compiled with the compiler that Triton ships and taken apart again: registers, spills, shared
memory, CTAs an SM, occupancy, tensor-core instructions, load widths, and for each inner loop a cycle count per hardware
pipe. Read in this order: calls (which, and what their launches are called), compiling, disassembly (SASS to
instructions), loops (control flow), lowered_text (what PTX and TTGIR know and SASS does not), pipes (instructions to
cycles), model (cycles to bounds), nvidia and amd (one kernel's figures), analysis (a kernel from source to figures, and
the reading checked against GEMMs that are known), bars (what must hold), runner and report. What an SM can do is in
offgpu/machines.py.

What the model is. Each instruction in the body of a loop is charged to its pipe at that pipe's documented throughput
(CUDA programming guide, "arithmetic instructions"; vendor peak FLOP/s and clocks). Everything is in SM cycles per
iteration of one CTA; an SM is 4 sub-partitions.

  issue   1 warp instruction a clock and sub-partition
  fma     FFMA, FMUL, FADD and IMAD: 64 lanes a clock and SM on A100, 128 on H100 and B200
  alu     64 lanes a clock: compare, min/max, select, logic, integer add, shift, bf16 pack
  xu      16 lanes a clock: MUFU (exp2, reciprocal, ...), int/float conversion
  udp     uniform datapath
  lsu     1 warp instruction a clock, and 128 bytes a clock of shared memory, including the operands that wgmma and
          tcgen05 read and the fills of asynchronous copies; its shared-memory part is also given as smem
  tensor  MMA instructions at their real rate
  (AMD: issue, valu, lds, tensor)

  bound   with MMA: dense bf16 FLOPs of the iteration at the SM's peak / the busiest pipe, as if all warps overlapped
          perfectly. An UPPER bound on the use of the tensor cores. Without MMA (a loop, or a whole kernel without one):
          headroom, DRAM cycles of the global bytes / the busiest pipe. At 2.0 the pipes need half the time that DRAM
          needs; below 1 the kernel cannot be bandwidth-bound.
  serial  the bound if a warp's tensor work and its own vector work do not overlap and only the resident warps hide each
          other: min(bound, R t / (stall + t)), R resident warps a sub-partition, t the tensor cycles of one warp, stall
          the sum of the control words' stall counts. Reality normally lies between the two.

Assumptions: mma.sync on H100 runs at 63% of the wgmma peak (Luo et al. 2024, microbenchmarks), on B200 at 25% of the
tcgen05 peak (a guess); wgmma with N < 64 costs as N = 64; tcgen05 with M = 64 costs as M = 128; clocks cancel.

What it is not. No caches, DRAM, bank conflicts, scoreboard stalls, barrier waits, wave quantisation, launch overhead or
power limits; masked lanes count as active; both sides of a branch in a loop are counted; trip counts are unknown, so
the "hot" loop is the tensor loop with most FLOPs an iteration (ties: fewest instructions), else the loop that loads
most (ties: least headroom). A kernel with a better bound can be slower. Warp-specialised kernels (partitions running
different loops side by side) are marked "(ws)" and their loops added pipe by pipe: rough. Use the figures to compare
variants of one op and to catch spills, narrow loads, a lost wgmma or TMA, and a saturated pipe.
"""
