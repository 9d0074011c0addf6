"""Tables: accuracy by depth for a terminal, and Markdown."""

from collections.abc import Iterable, Mapping

FLOOR_LABEL = "surface guess"  # the best one, see floors.py
Accuracy = Mapping[str, Mapping[str, float]]  # row -> depth -> share of right answers
Intervals = Mapping[str, Mapping[str, tuple[float, float]]]  # row -> depth -> (low, high)


def format_accuracy(rows: Accuracy, depth_name: str = "depth") -> str:
    """A table with a column per depth, at most 80 characters wide: `rows` by name, shares with two decimals."""
    depths = list(dict.fromkeys(depth for values in rows.values() for depth in values))
    width = max(len(name) for name in [depth_name, *rows])
    per_line = max(1, (80 - width) // 6)
    lines = []
    for start in range(0, len(depths), per_line):
        part = depths[start : start + per_line]
        lines.append(f"{depth_name:{width}}" + "".join(f"{depth:>6}" for depth in part))
        for name, values in rows.items():
            cells = (f"{values[depth]:6.2f}" if depth in values else f"{'-':>6}" for depth in part)
            lines.append(f"{name:{width}}" + "".join(cells))
    return "\n".join(lines)


def some_depths(depths: Iterable[str], most: int = 12) -> list[str]:
    """All depths, or of more than `most` the powers of two and the deepest."""
    found = list(depths)
    if len(found) <= most:
        return found
    powers = [depth for depth in found if (number := int(depth)) & (number - 1) == 0]
    return list(dict.fromkeys([*powers, found[-1]]))


def with_intervals(accuracy: Accuracy, intervals: Intervals) -> dict[str, Mapping[str, float]]:
    """Every row followed by a row "±": the longer side of its interval."""
    rows = {}
    for name, values in accuracy.items():
        rows[name] = values
        rows[f"{name} ±"] = {
            depth: max(values[depth] - low, high - values[depth]) for depth, (low, high) in intervals[name].items()
        }
    return rows


def markdown_table(columns: list[str], rows: list[list[str]], left: int = 0) -> list[str]:
    """The lines of a Markdown table with aligned columns, the first `left` of them flush left."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(columns))]

    def line(row: list[str]) -> str:
        padded = [
            text.ljust(w) if i < left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return [line(cells[0]), f"|{rule}|", *map(line, cells[1:])]
