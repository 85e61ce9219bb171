"""Machine code back to instructions: SASS by the nvdisasm that Triton ships, and AMD's assembly text."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, replace

import triton

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);?\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_PREDICATED = re.compile(r"(@!?U?P\w+)\s+(.*)")
_AMD_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
_AMD_INSTRUCTION = re.compile(r"^[sv]_|^ds_|^buffer_|^global_|^scratch_|^flat_")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction. stall: the issue cycles that its control word makes the warp wait."""

    address: int
    predicate: str  # "@P0", "@!UP1", or ""
    opcode: str  # with modifiers: "LDG.E.128"
    operands: str
    stall: int = 0

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Program:
    """instructions: of the entry function, in address order. labels: {name: address}. The rest is per thread."""

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int
    stack_bytes: int
    local_bytes: int


def disassemble(cubin: bytes) -> Program:
    """The entry function of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run("nvdisasm", "-c", "-hex", file.name)
        resources = _run("cuobjdump", "--dump-resource-usage", file.name)
    instructions, labels = _parse_sass(listing)

    def used(key: str) -> int:
        return max([int(number) for number in re.findall(rf"\b{key}:(\d+)", resources)] or [0])

    return Program(_attach_tcgen05_shapes(instructions), labels, used("REG"), used("STACK"), used("LOCAL"))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([os.path.join(_TOOLS, tool), *arguments], capture_output=True, text=True, check=True).stdout


def _parse_sass(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in listing.splitlines():
        if match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _INSTRUCTION.match(line):
            address = int(match[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            if instructions and address <= instructions[-1].address:
                break  # a second function begins: the entry came first
            instructions.append(_parse_instruction(address, match[2]))
        elif (match := _SECOND_WORD.match(line)) and instructions and instructions[-1].stall == 0:
            # Bits 105..108 of the 128-bit instruction: the stall count of the control word.
            instructions[-1] = replace(instructions[-1], stall=max(1, (int(match[1], 16) >> 41) & 0xF))
    return instructions, labels


def _parse_instruction(address: int, text: str) -> Instruction:
    text = text.strip().rstrip(";").strip()
    match = _PREDICATED.match(text)
    predicate, text = match.groups() if match else ("", text)
    opcode, _, operands = text.partition(" ")
    return Instruction(address, predicate, opcode.rstrip(";"), operands.strip())


def _attach_tcgen05_shapes(instructions: list[Instruction]) -> list[Instruction]:
    """tcgen05's M and N sit in a descriptor that a UMOV loads: append them to the operands, as shape=MxN."""
    registers, out = {}, []
    for ins in instructions:
        move = re.match(r"(UR\d+), (0x[0-9a-f]+)$", ins.operands)
        if ins.opcode == "UMOV" and move:
            registers[move[1]] = int(move[2], 16)
        elif is_tcgen05_mma(ins):
            descriptor = re.search(r"idesc\[(UR\d+)\]", ins.operands)
            shape = decode_tcgen05_shape(registers.get(descriptor[1])) if descriptor else None
            if shape:
                ins = replace(ins, operands=f"{ins.operands} shape={shape[0]}x{shape[1]}")
        out.append(ins)
    return out


def is_tcgen05_mma(ins: Instruction) -> bool:
    return ins.base.startswith("UTC") and "MMA" in ins.base


def decode_tcgen05_shape(descriptor: int | None) -> tuple[int, int] | None:
    """(M, N) of a tcgen05 instruction descriptor; None where the number cannot be one."""
    if descriptor is None:
        return None
    M, N = ((descriptor >> 24) & 0x1F) << 4, ((descriptor >> 17) & 0x3F) << 3
    return (M, N) if M in (64, 128, 256) and 8 <= N <= 256 else None


def parse_amd(assembly: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(opcode, operands) of each instruction of an AMD assembly text, and {label: index of what follows it}."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        line = line.split(";")[0].strip()
        if match := _AMD_LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif _AMD_INSTRUCTION.match(line):
            opcode, _, operands = line.partition(" ")
            instructions.append((opcode, operands.strip()))
    return instructions, labels
