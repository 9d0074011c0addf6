"""Tables: accuracy by depth for a terminal, and Markdown."""

from collections.abc import Iterable, Mapping

FLOOR_LABEL = "surface guess"  # the best one, see floors.py
Accuracy = Mapping[str, Mapping[str, float]]  # row -> depth -> share of right answers
Intervals = Mapping[str, Mapping[str, tuple[float, float]]]  # row -> depth -> (low, high)


def format_accuracy(rows: Accuracy, depth_name: str = "depth") -> str:
    """A table with a column per depth, at most 80 characters wide: `rows` by name, shares with two decimals."""
    return format_rows(rows, depth_name, decimals=2)


def format_rows(rows: Mapping[str, Mapping[str, float]], name_of_columns: str, decimals: int) -> str:
    """A table at most 80 characters wide: a column for each key of `rows`' values, in the order they appear."""
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    first = max(len(name) for name in [name_of_columns, *rows])
    width = max([decimals + 4, *(len(column) + 1 for column in columns)])
    per_line = max(1, (80 - first) // width)
    lines = []
    for start in range(0, len(columns), per_line):
        part = columns[start : start + per_line]
        lines.append(f"{name_of_columns:{first}}" + "".join(f"{column:>{width}}" for column in part))
        for name, values in rows.items():
            cells = (f"{values[c]:{width}.{decimals}f}" if c in values else f"{'-':>{width}}" for c in part)
            lines.append(f"{name:{first}}" + "".join(cells))
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
