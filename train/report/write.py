"""Write a report: a self-contained HTML page, and Markdown with its figures beside it."""

from pathlib import Path

from powernap.train.evaluation.tables import markdown_table
from powernap.train.outputs import check_folder
from powernap.train.report.content import Cell, Report, Section, Table, report_of
from powernap.train.report.runs import group_runs, read_runs


def write_report(runs: list[Path], to: Path, title: str | None = None) -> list[Path]:
    """Compare run folders.

    Returns:
        the files written: report.html, report.md and a PNG for each of the latter's figures.

    Raises:
        ReportError, RecipeError: if a run cannot be read or runs cannot be compared.
        OutputError: if `to` cannot be written.
    """
    check_folder(to, "--to")
    report = report_of(group_runs(read_runs(runs)), title)
    to.mkdir(parents=True, exist_ok=True)
    page, text = to / "report.html", to / "report.md"
    page.write_text(_page(report), encoding="utf-8")
    text.write_text(_markdown(report), encoding="utf-8")
    pictures = []
    for picture in (picture for section in report.sections for picture in section.pictures):
        pictures.append(to / f"{picture.name}.png")
        picture.save_png(pictures[-1])
    return [page, text, *pictures]


def _page(report: Report) -> str:
    import jinja2  # late: only this command needs it

    loader = jinja2.PackageLoader("powernap.train.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("page.html").render(report=report)


def _markdown(report: Report) -> str:
    lines = [f"# {_escaped(report.title)}", "", report.lead, ""]
    lines += [f"- {text} `{command}`" if command else f"- {text}" for text, command in report.notices]
    for section in report.sections:
        lines += ["", *_section(section)]
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section) -> list[str]:
    lines = [f"## {section.title}", ""]
    for paragraph in section.paragraphs:
        lines += [paragraph, ""]
    for picture in section.pictures:
        alt = picture.alt.replace("[", "(").replace("]", ")")
        lines += [f"**{picture.title}.** {picture.caption}", "", f"![{alt}]({picture.name}.png)", ""]
    for table in section.tables:
        lines += _table(table)
    return lines


def _table(table: Table) -> list[str]:
    lines = markdown_table(table.columns, [[_text(cell) for cell in row] for row in table.rows], table.left)
    lines += ["", table.caption] if table.caption else []
    if table.summary:
        lines = [f"<details><summary>{table.summary}</summary>", "", *lines, "", "</details>"]
    return [*lines, ""]


def _text(cell: Cell) -> str:
    return f"{cell.text} {cell.detail}".strip()


def _escaped(text: str) -> str:
    return text.replace("_", r"\_").replace("*", r"\*")
