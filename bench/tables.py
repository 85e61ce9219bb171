"""Tables for a terminal and for Markdown, from the same rows."""


def aligned(headers: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell: numbers to the right, text and the first column to the left."""
    cells = [headers, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    numeric = _numeric_columns(rows, len(headers))

    def line(row):
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *map(line, rows)])


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    numeric = _numeric_columns(rows, len(headers))
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [headers, rule, *rows]
    )


def _numeric_columns(rows: list[list[str]], count: int) -> list[bool]:
    return [column > 0 and _is_numeric([row[column] for row in rows]) for column in range(count)]


def _is_numeric(cells: list[str]) -> bool:
    return any(cell[:1].isdigit() for cell in cells) and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)
