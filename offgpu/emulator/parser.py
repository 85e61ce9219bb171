"""PTX text -> kernels: parameters, registers, memory symbols, and basic blocks of instructions.

A block ends at a branch, an exit, a barrier or a label, so that lanes only ever part or wait at the end of one.
Operands stay text ("%r12", "0f3F800000", "[%rd3+16]"), vectors become lists of text; the translator gives them
meaning.
"""

import functools
import re
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    guard: tuple[bool, str] | None  # (negated, predicate register) of "@!%p1 ..."
    opcode: str  # with its modifiers: "ld.global.v4.b32"
    operands: list
    line: tuple[int, int]  # (file number, line) of the last .loc


class Register(NamedTuple):
    number: int  # its place in the list of registers
    bits: int


class Parameter(NamedTuple):
    name: str
    type: str
    num_bytes: int


class Symbol(NamedTuple):
    num_bytes: int | None  # None: as much as the launch asks for (extern shared memory)
    align: int
    initial: str | None
    element_bytes: int


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    registers: dict[str, Register] = field(default_factory=dict)
    shared: dict[str, Symbol] = field(default_factory=dict)
    constants: dict[str, Symbol] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)  # name -> bytes
    files: dict[int, str] = field(default_factory=dict)
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> block index
    code: dict = field(default_factory=dict)  # (block index, masked) -> Python function, filled while running

    @property
    def opcodes(self) -> set[str]:
        return {instruction.opcode for block in self.blocks for instruction in block}

    @functools.cached_property
    def warpgroup_blocks(self) -> set[int]:
        """Blocks with a wgmma: four warps run them together."""
        return {b for b, block in enumerate(self.blocks) if any(i.opcode.startswith("wgmma.mma") for i in block)}

    def where(self, line) -> str:
        return f"{self.files.get(line[0], '?')}:{line[1]}" if line else "?"


def bits_of(type_name: str) -> int:
    """Width of a PTX type: "pred" 1, "bf16" 16, "f16x2" 32, "b64" 64."""
    if type_name == "pred":
        return 1
    return int(re.sub(r"[a-z]", "", type_name.split("x")[0]) or 32) * (2 if type_name.endswith("x2") else 1)


@functools.lru_cache(maxsize=256)
def parse(ptx: str) -> dict[str, Kernel]:
    """All entry points of a PTX module, by name."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", _steady_lines(ptx))
    files = {
        int(n): re.findall(r'"([^"]*)"', rest)[-1] for n, rest in re.findall(r"^\s*\.file\s+(\d+)\s+(.*)$", text, re.M)
    }
    text = re.sub(r"^\s*\.file.*$", "", text, flags=re.M)
    text = re.sub(r"^\s*\.loc\s+(\d+)\s+(\d+)[^\n;]*$", r".loc \1 \2;", text, flags=re.M)
    shared = _symbols(r"\.shared", text)
    constants = _symbols(r"\.(?:global|const)", text[: text.find(".entry")])
    kernels = {}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
        kernel = Kernel(entry.group(1), shared=shared, constants=constants, files=files)
        kernel.parameters = [_parameter(p.strip()) for p in entry.group(2).split(",") if p.strip()]
        _Body(kernel).read(text[entry.end() : _closing_brace(text, entry.end())])
        kernels[kernel.name] = kernel
    return kernels


def _steady_lines(ptx):
    """Drop .loc inside inline assembly (Triton's loads and stores): it may count on from the true source line."""
    inline = r"// begin inline asm.*?// end inline asm"
    return re.sub(inline, lambda m: re.sub(r"^\s*\.loc[^\n]*$", "", m.group(), flags=re.M), ptx, flags=re.S)


def _symbols(space, text):
    declaration = space + r"\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*(?:=\s*\{([^}]*)\})?;"
    found = {}
    for align, type_name, name, count, initial in re.findall(declaration, text):
        element = bits_of(type_name) // 8
        found[name] = Symbol(int(count) * element if count else None, int(align), initial or None, element)
    return found


def _parameter(text):
    m = re.match(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\b.*?([\w$]+)(?:\[(\d+)\])?$", text)
    return Parameter(m.group(2), m.group(1), bits_of(m.group(1)) // 8 * int(m.group(3) or 1))


def _closing_brace(text, position):
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if brace.group() == "{" else -1
        if not depth:
            return brace.start()
    raise ValueError("the function body does not end")


class _Body:
    """Reads one function body statement by statement."""

    LABEL = re.compile(r"([\w$]+):")

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.block: list[Instruction] = []
        kernel.blocks = [self.block]
        self.scopes: list[dict] = [{}]  # registers declared in { ... } hide outer ones: name -> unique name
        self.num_scopes = 0
        self.line = (0, 0)

    def read(self, text):
        position = 0
        while True:
            while position < len(text) and (text[position].isspace() or text[position] == ";"):
                position += 1
            if position >= len(text):
                return
            label = self.LABEL.match(text, position)
            if text[position] == "{":
                self.num_scopes += 1
                self.scopes.append({})
                position += 1
            elif text[position] == "}":
                self.scopes.pop()
                position += 1
            elif label:
                self._new_block()
                self.kernel.labels[label.group(1)] = len(self.kernel.blocks) - 1
                position = label.end()
            else:
                end = text.find(";", position)
                self._statement(" ".join(text[position:end].split()))
                position = end + 1

    def _new_block(self):
        if self.block:
            self.block = []
            self.kernel.blocks.append(self.block)

    def _statement(self, text):
        if text.startswith(".loc "):
            file, line = map(int, text.split()[1:3])
            self.line = (file, line)
        elif text.startswith(".reg"):
            self._declare_registers(text)
        elif text.startswith(".local"):
            name, size = re.match(r"\.local\s+\.align\s+\d+\s+\.\w+\s+([\w$]+)\[(\d+)\]", text).groups()
            self.kernel.local[name] = int(size)
        elif text[0] != ".":
            self._instruction(text)

    def _declare_registers(self, text):
        type_name, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
        registers, bits = self.kernel.registers, bits_of(type_name)
        for name in (n.strip() for n in names.split(",")):
            family = re.match(r"(.*)<(\d+)>$", name)
            if family:
                for j in range(int(family.group(2))):
                    registers[family.group(1) + str(j)] = Register(len(registers), bits)
                continue
            unique = name if len(self.scopes) == 1 else f"{name}@{self.num_scopes}"
            if unique != name:
                self.scopes[-1][name] = unique
            registers[unique] = Register(len(registers), bits)

    def _instruction(self, text):
        negated, predicate, opcode, rest = re.match(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text).groups()
        operands = [self._scoped(operand) for operand in _split_operands(rest)]
        guard = (negated == "!", self._unique(predicate)) if predicate else None
        if opcode.startswith("wgmma.fence"):
            self._new_block()
        self.block.append(Instruction(guard, opcode, operands, self.line))
        root = opcode.split(".")[0]
        if root in ("bra", "ret", "exit", "brx", "trap") or (root in ("bar", "barrier") and ".warp" not in opcode):
            self._new_block()

    def _unique(self, name):
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), name)

    def _scoped(self, operand):
        if isinstance(operand, list):
            return [self._scoped(part) for part in operand]
        return re.sub(r"[%\w$]+", lambda m: self._unique(m.group()), operand) if len(self.scopes) > 1 else operand


def _split_operands(text):
    """ "%r1, {%r2, %r3}, [%rd1+4]" -> ["%r1", ["%r2", "%r3"], "[%rd1+4]"]"""
    parts, depth, part = [], 0, ""
    for c in text + ",":
        if c == "," and depth == 0:
            if part.strip():
                parts.append(part.strip())
            part = ""
        else:
            depth += (c in "{[(") - (c in "}])")
            part += c
    return [[x.strip() for x in p[1:-1].split(",")] if p[0] in "{(" else p for p in parts]
