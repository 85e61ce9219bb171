"""Natural loops of a control-flow graph (Aho, Sethi and Ullman 1986, section 10.4), for SASS."""

import re

from heiretsu.offgpu.audit.disassembly import Instruction

_LEAVES = ("EXIT", "RET", "BRX")


def natural_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[tuple[int, set[int]]]:
    """(address of the header, indices of the body's instructions) of every loop, nested ones included."""
    blocks, successors = _blocks(instructions, labels)
    predecessors: list[list[int]] = [[] for _ in blocks]
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(block)
    # Blocks that only a jump table (BRX) reaches are roots of their own.
    roots = [0] + [block for block in range(1, len(blocks)) if not predecessors[block]]
    order = _reverse_postorder(successors, roots)
    dominators = _dominators(order, predecessors, roots)
    bodies: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if header in dominators[block]:  # a back edge
                body = bodies.setdefault(header, {header})
                waiting = [block]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting.extend(p for p in predecessors[inside] if p in dominators)
    return [
        (instructions[blocks[header][0]].address, {index for block in body for index in blocks[block]})
        for header, body in bodies.items()
    ]


def _blocks(instructions, labels):
    """Basic blocks (ranges of instruction indices) and each one's successors."""
    index_at = {ins.address: index for index, ins in enumerate(instructions)}
    target = {}
    for index, ins in enumerate(instructions):
        if ins.opcode.startswith(("BRA", "BRX")):
            label = re.search(r"(\.L_x_\d+)", ins.operands)
            if label and labels.get(label[1]) in index_at:
                target[index] = index_at[labels[label[1]]]
    ends = {i for i, ins in enumerate(instructions) if i in target or ins.base in _LEAVES}
    leaders = sorted({0} | set(target.values()) | {i + 1 for i in ends if i + 1 < len(instructions)})
    blocks = [range(start, end) for start, end in zip(leaders, [*leaders[1:], len(instructions)], strict=True)]
    block_at = {start: block for block, start in enumerate(leaders)}
    successors = []
    for block, indices in enumerate(blocks):
        last = indices[-1]
        jumps = [block_at[target[last]]] if last in target else []
        falls_through = not (last in ends and _unconditional(instructions[last])) and block + 1 < len(blocks)
        successors.append(jumps + [block + 1] if falls_through else jumps)
    return blocks, successors


def _unconditional(ins: Instruction) -> bool:
    return not ins.predicate and not re.search(r"\b!?UP\d", ins.operands.split("`")[0])


def _reverse_postorder(successors, roots):
    seen, order = set(), []
    for root in roots:
        stack = [] if root in seen else [(root, 0)]
        seen.add(root)
        while stack:
            block, tried = stack.pop()
            if tried == len(successors[block]):
                order.append(block)
                continue
            stack.append((block, tried + 1))
            following = successors[block][tried]
            if following not in seen:
                seen.add(following)
                stack.append((following, 0))
    return order[::-1]


def _dominators(order, predecessors, roots):
    """{block: the blocks on every path to it, itself included}, by iteration to the fixed point."""
    everything = set(order)
    dominators = {block: ({block} if block in roots else everything) for block in order}
    changed = True
    while changed:
        changed = False
        for block in order:
            if block in roots:
                continue
            above = [dominators[p] for p in predecessors[block] if p in dominators]
            new = (set.intersection(*above) if above else set()) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
