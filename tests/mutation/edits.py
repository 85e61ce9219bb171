"""Every small edit of a source file that is worth trying: a comparison, a constant, an operator, a dropped statement.

What no test should look at is not edited: docstrings, annotations, and texts that are only read by people (of an error,
a print or a log, a flag's help, the words of an f-string; but the values in them are).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """One replacement in one file. lines: those of the innermost statement, or header of one, that holds it."""

    file: str
    start: int  # offsets in the file's bytes
    end: int
    new: str
    kind: str
    line: int
    lines: range
    scope: range | None  # lines of the innermost function; None at the top of a module or class
    before: str  # the whole lines that it changes, without indentation
    after: str

    def apply(self, source: str) -> str:
        data = source.encode()
        return (data[: self.start] + self.new.encode() + data[self.end :]).decode()

    def is_edit(self, source: str) -> bool:
        """That the edited text parses, and to something else. (Positions in f-strings are not always right.)"""
        try:
            edited = ast.parse(self.apply(source))
        except (SyntaxError, ValueError):
            return False
        return ast.dump(edited) != ast.dump(ast.parse(source))

    def __str__(self) -> str:
        if "\n" in self.before + self.after:
            return f"{self.file}:{self.line}: {self.kind}\n  {self.before}\n  ->\n  {self.after}"
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


COMPARISONS: dict[type[ast.cmpop], list[str]] = {  # one step off at the boundary, and the opposite
    ast.Lt: ["<=", ">="],
    ast.LtE: ["<", ">"],
    ast.Gt: [">=", "<="],
    ast.GtE: [">", "<"],
    ast.Eq: ["!="],
    ast.NotEq: ["=="],
    ast.Is: ["is not"],
    ast.IsNot: ["is"],
    ast.In: ["not in"],
    ast.NotIn: ["in"],
}
OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.MatMult: ("@", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"),
}
TALK = set("print refuse say warn exit error write ValueError RuntimeError TypeError OSError".split())
TALKING_KEYWORDS = {"help", "description", "metavar", "epilog", "prog", "desc", "unit"}
# Swapping their first two arguments changes nothing.
SYMMETRIC = {"min", "max", "gcd", "maximum", "minimum", "isclose", "equal", "mul", "add", "transpose"}


def edits_of(file: str, source: str) -> list[Edit]:
    """All edits of a source text, in order of position. Whether one of them parses is seen when it is drawn."""
    found = _Finder(file, source)
    found.walk()
    return sorted(found.edits, key=lambda edit: (edit.start, edit.end, edit.new))


class _Finder:
    def __init__(self, file: str, source: str):
        self.file, self.source, self.data = file, source, source.encode()
        self.tree = ast.parse(source)
        self.offsets = [0]  # of each line's first byte
        for line in self.data.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.edits: list[Edit] = []
        self.statement: range = range(0)
        self.scope: range | None = None
        self.assigned: list[set[str]] = [set()]  # names that each enclosing function has assigned so far

    def walk(self) -> None:
        self._body(self.tree.body)

    # Statements

    def _body(self, body: list[ast.stmt]) -> None:
        for node in body:
            self._statement(node)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring, or dots
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal | ast.Pass):
            return
        nested = [name for name in ("body", "orelse", "finalbody", "handlers", "cases") if getattr(node, name, None)]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._definition(node)
            return
        inner = [getattr(child, "pattern", child) for name in nested for child in getattr(node, name)]
        last = min((child.lineno for child in inner), default=node.end_lineno + 1) - 1
        self.statement = range(node.lineno, max(last, node.lineno) + 1)
        if not nested:
            self._drop(node)
        for name, value in ast.iter_fields(node):
            if name in nested or name in ("annotation", "simple"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.expr):
                    self._expression(child, talk=isinstance(node, ast.Assert) and name == "msg")
                elif isinstance(child, ast.withitem):
                    self._expression(child.context_expr)
        if isinstance(node, ast.If | ast.While):
            self._negate(node.test)
        if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
            self._between(node.target, node.value, *OPERATORS[type(node.op)], kind="operator")
        for target in _names(node):
            self.assigned[-1].add(target)
        for name in nested:
            for child in getattr(node, name):
                if isinstance(child, ast.stmt):
                    self._statement(child)
                else:  # an except clause or a case
                    self._body(child.body)

    def _definition(self, node) -> None:
        outer_scope = self.scope
        self.statement = range(node.lineno, node.body[0].lineno)
        if isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                self._expression(decorator)
            self._body(node.body)
            return
        for decorator in node.decorator_list:
            self.statement = range(decorator.lineno, decorator.end_lineno + 1)
            self._expression(decorator)
        self.scope = range(node.lineno, node.end_lineno + 1)
        self.statement = range(node.lineno, node.body[0].lineno)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self._expression(default)
        self.assigned.append({arg.arg for arg in [*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs]})
        self._body(node.body)
        self.assigned.pop()
        self.scope = outer_scope

    def _drop(self, node: ast.stmt) -> None:
        """What can be left out without a NameError, which any test would see."""
        if isinstance(node, ast.Expr) and _called(node.value) in TALK - {"refuse", "exit", "error", "write"}:
            return
        if isinstance(node, ast.Assign):
            rebinds = any(
                isinstance(target, ast.Attribute | ast.Subscript) or _bound(target) & self.assigned[-1]
                for target in node.targets
            )
            if not rebinds:
                return
        elif not isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Continue | ast.Break | ast.Delete):
            return
        self._add(node, "pass", "dropped statement")

    # Expressions

    def _expression(self, node: ast.expr, talk: bool = False) -> None:
        if isinstance(node, ast.Constant):
            self._constant(node, talk)
        elif isinstance(node, ast.Compare):
            left = node.left
            for op, right in zip(node.ops, node.comparators, strict=True):
                for new in COMPARISONS[type(op)]:
                    self._between(left, right, COMPARISON_TEXT[type(op)], new, kind="comparison")
                left = right
        elif isinstance(node, ast.BinOp) and not _is_text(node):
            self._between(node.left, node.right, *OPERATORS[type(node.op)], kind="operator")
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                self._between(left, right, old, new, kind="boolean")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            self._add(node, self._text(node.operand), "sign" if isinstance(node.op, ast.USub) else "negation")
        elif isinstance(node, ast.IfExp):
            self._negate(node.test)
        elif isinstance(node, ast.Call):
            self._call(node, talk)
            return
        elif isinstance(node, ast.comprehension):
            for test in node.ifs:
                self._negate(test)
        elif isinstance(node, ast.JoinedStr):
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    self._expression(part.value)
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr | ast.comprehension):
                self._expression(child, talk and isinstance(node, ast.BinOp | ast.JoinedStr | ast.IfExp))

    def _call(self, node: ast.Call, talk: bool) -> None:
        name = _called(node)
        talk = talk or name in TALK
        self._expression(node.func)
        for argument in node.args:
            self._expression(argument, talk)
        for keyword in node.keywords:
            if keyword.arg != "strict":  # of zip: an assertion, and those are ours
                self._expression(keyword.value, talk or keyword.arg in TALKING_KEYWORDS)
            if keyword.arg not in (None, "strict", *TALKING_KEYWORDS) and not talk:
                self._drop_argument(node, keyword)
        first, second = (*node.args, None, None)[:2]
        plain = (ast.Name, ast.Attribute, ast.Subscript, ast.Constant)
        if isinstance(first, plain) and isinstance(second, plain) and name not in SYMMETRIC and not talk:
            texts = self._text(first), self._text(second)
            if texts[0] != texts[1] and not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                middle = self.data[self._end(first) : self._start(second)].decode()
                self._replace(
                    self._start(first), self._end(second), texts[1] + middle + texts[0], "swapped arguments", node
                )

    def _drop_argument(self, call: ast.Call, keyword: ast.keyword) -> None:
        rest = [self._text(part) for part in [*call.args, *call.keywords] if part is not keyword]
        # Only where the order of the source is that of positional arguments, then keywords.
        if all(self._start(a) < self._start(k) for a in call.args for k in call.keywords):
            new = f"{self._text(call.func)}({', '.join(rest)})"
            self._add(call, new, "dropped argument")

    def _constant(self, node: ast.Constant, talk: bool) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add(node, str(not value), "constant")
        elif isinstance(value, int):
            self._add(node, str(value + 1), "constant")
            if value > 1:
                self._add(node, str(value - 1), "constant")
        elif isinstance(value, float):
            self._add(node, "1.0" if value == 0 else repr(value * 2), "constant")
        elif isinstance(value, str) and not talk:
            self._add(node, repr(value + "X"), "constant")

    def _negate(self, test: ast.expr) -> None:
        simple = isinstance(test, ast.Compare) and len(test.ops) == 1
        if not simple and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
            self._add(test, f"(not ({self._text(test)}))", "negated condition")

    # Positions

    def _start(self, node) -> int:
        return self.offsets[node.lineno - 1] + node.col_offset

    def _end(self, node) -> int:
        return self.offsets[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node) -> str:
        return self.data[self._start(node) : self._end(node)].decode()

    def _between(self, left, right, old: str, new: str, kind: str) -> None:
        """Replace an operator, which has no position of its own, between its two operands."""
        begin, end = self._end(left), self._start(right)
        place = self.data.find(old.encode(), begin, end)
        if place >= 0:
            self._replace(place, place + len(old.encode()), new, kind, left)

    def _add(self, node, new: str, kind: str) -> None:
        self._replace(self._start(node), self._end(node), new, kind, node)

    def _replace(self, start: int, end: int, new: str, kind: str, node) -> None:
        first = self.data.rfind(b"\n", 0, start) + 1
        last = self.data.find(b"\n", end)
        before = self.data[first:last].decode()
        after = (self.data[first:start] + new.encode() + self.data[end:last]).decode()
        line = self.data.count(b"\n", 0, start) + 1
        lines = self.statement if line in self.statement else range(line, line + 1)
        edit = Edit(self.file, start, end, new, kind, line, lines, self.scope, _stripped(before), _stripped(after))
        self.edits.append(edit)


COMPARISON_TEXT = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=",
    ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in",
}  # fmt: skip


def _stripped(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


def _called(node: ast.AST) -> str:
    """The last name of what is called: `say` of log.say(...); empty for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def _is_text(node: ast.BinOp) -> bool:
    """A concatenation or format of strings, as far as one can see: its mutation is a TypeError."""
    return any(
        isinstance(side, ast.JoinedStr) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _bound(target: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _names(node: ast.stmt) -> Iterator[str]:
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    for target in targets:
        if target is not None:
            yield from _bound(target)
