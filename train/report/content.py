"""The content of a report: sections of sentences, tables and figures, for both the page and Markdown."""

import statistics
from dataclasses import dataclass, field

from powernap.parallel.planning.plan import in_bytes, in_units
from powernap.train.data.vocabulary import depth_name_of
from powernap.train.evaluation.tables import FLOOR_LABEL
from powernap.train.report.figures import (
    Picture,
    Styles,
    accuracy_by_cost,
    accuracy_by_depth,
    accuracy_by_passes,
    loss_curves,
    named,
    styles_of,
)
from powernap.train.report.runs import Group, ReportedRun, Share, differing_fields

DEEPEST = 2  # depths that get a figure over N

INTERVAL = (
    "Brackets hold a run's 95 % interval, in which the answers of one sequence are counted together (arXiv 2411.00640)."
)
SEEDS = "Of several seeds: the mean, and from the lowest seed to the highest. That is a range, not an interval."


@dataclass(frozen=True)
class Cell:
    text: str
    detail: str = ""  # in smaller type
    color: str | None = None  # of the group's mark


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    summary: str = ""  # of a folded table: its text when closed
    left: int = 1  # columns of words


@dataclass
class Section:
    title: str
    paragraphs: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    title: str
    lead: str
    notices: list[tuple[str, str]]  # what is missing, and the command that provides it
    sections: list[Section]


def report_of(groups: list[Group], title: str | None) -> Report:
    """The full report on groups of runs."""
    styles, runs = styles_of(groups), [run for group in groups for run in group.runs]
    depths = sorted({depth for run in runs for depth in run.depths}, key=int)
    tasks = {run.task for run in runs if run.task}
    task = tasks.pop() if tasks else None
    depth_name = depth_name_of(next((run.manifest for run in runs if run.manifest), None))
    count = f"{len(groups)} recipes" if len(groups) > 1 else "One recipe"
    lead = f"{count}, {len(runs)} run{'s' if len(runs) > 1 else ''}{f', task {task}' if task else ''}."
    sections = [_summary(groups, depths, depth_name, styles), _what_differs(groups)]
    if any(group.evaluated for group in groups):
        sections.append(_answers(groups, depths, depth_name, styles) if depths else _held_out_loss(groups))
    sections += [_training(groups, styles), _cost(groups), _origin(runs)]
    labels = [group.label for group in groups]
    return Report(title or ", ".join(labels[:4]) + (" ..." if len(labels) > 4 else ""), lead, _notices(runs), sections)


def _notices(runs: list[ReportedRun]) -> list[tuple[str, str]]:
    notices = []
    for run in runs:
        if not run.evaluation:
            notices.append(
                (
                    f"{run.path}: not evaluated, so without accuracy here. Its numbers come with",
                    f"powernap eval {run.path}",
                )
            )
        elif run.evaluation["step"] != run.steps:
            notices.append(
                (
                    f"{run.path}: evaluated after step {run.evaluation['step']:,}, trained to {run.steps:,}.",
                    f"powernap eval {run.path}",
                )
            )
        if run.evaluation and run.depths and "guesses" not in run.evaluation:
            notices.append(
                (
                    f"{run.path}: evaluated by an older version, whose {FLOOR_LABEL} is the best constant only.",
                    f"powernap eval {run.path}",
                )
            )
        if run.steps < run.recipe.train.steps:
            notices.append((f"{run.path}: {run.steps:,} of {run.recipe.train.steps:,} steps done.", ""))
    return notices


def _summary(groups: list[Group], depths: list[str], depth_name: str, styles: Styles) -> Section:
    deepest = depths[-1:]
    columns = ["", f"right at {named(deepest[0], depth_name)}, %" if deepest else "held-out loss"]
    columns += ["seeds", "trained N", "parameters", "training FLOPs", "time"]
    rows = []
    for group in groups:
        first = group.runs[0]
        if not group.evaluated:
            result = Cell("-")
        elif deepest:
            result = _percent(group, group.read_passes, deepest[0])
        else:
            result = _number(group, group.read_passes)
        choices = ", then ".join(", ".join(map(str, passes)) for passes in first.passes_in_turn)
        rows.append([
            _mark(group, styles), result, Cell(str(len(group.runs)), f"({', '.join(map(str, group.seeds))})"),
            Cell(choices), Cell(in_units(first.parameters)),
            Cell(in_units(_mean(run.flops for run in group.furthest))),
            Cell(_time(_mean(run.seconds for run in group.furthest))),
        ])  # fmt: skip
    for depth in deepest:
        floors = [floor for group in groups if (floor := group.floor(depth))]
        rows.append([Cell(FLOOR_LABEL), _floor_cell(floors), *[Cell("")] * (len(columns) - 2)])
    caption = (
        f"Each read with the N it was trained with, the largest of several. {INTERVAL} {SEEDS}" if deepest else SEEDS
    )
    return Section("In short", tables=[Table(columns, rows, caption)])


def _what_differs(groups: list[Group]) -> Section:
    differing = differing_fields(groups)
    section = Section("What is compared")
    if differing:
        rows = [[Cell(name), *(Cell(_value(group.fields.get(name))) for group in groups)] for name in differing]
        section.tables.append(Table(["field", *(group.label for group in groups)], rows, left=1 + len(groups)))
    else:
        section.paragraphs.append("All runs have the same recipe; they differ in seeds and folders.")
    common = [name for name in groups[0].fields if name not in differing]
    rows = [[Cell(name), Cell(_value(groups[0].fields[name]))] for name in common]
    section.tables.append(Table(["field", "value"], rows, summary=f"{len(rows)} fields that are the same", left=2))
    return section


def _answers(groups: list[Group], depths: list[str], depth_name: str, styles: Styles) -> Section:
    evaluated = [group for group in groups if group.evaluated]
    columns = ["", "N", f"{depth_name} {depths[0]}", *depths[1:], "loss"]
    tables = [_accuracy(evaluated, depths, depth_name, columns, styles)]
    if any(len(group.evaluated) > 1 for group in evaluated):
        tables.append(_every_run(evaluated, depths, columns))
    return Section("Answers right", pictures=_accuracy_pictures(evaluated, depths, depth_name, styles), tables=tables)


def _accuracy_pictures(groups: list[Group], depths: list[str], depth_name: str, styles: Styles) -> list[Picture]:
    """Accuracy by depth; by N for the deepest depths asked, if N varies; by cost for the deepest."""
    asked = {depth: [group for group in groups if group.accuracy(group.read_passes, depth)] for depth in depths}
    deepest_first = [depth for depth in reversed(depths) if asked[depth]]
    pictures = [accuracy_by_depth(groups, depths, depth_name, styles)] if len(depths) > 1 else []
    for depth in deepest_first[:DEEPEST]:
        if len({n for group in asked[depth] for n in group.all_passes}) > 1:
            pictures.append(accuracy_by_passes(asked[depth], depth, depth_name, styles))
    deepest = deepest_first[0]
    return [*pictures, accuracy_by_cost(asked[deepest], deepest, depth_name, styles)]


def _accuracy(groups: list[Group], depths: list[str], depth_name: str, columns: list[str], styles: Styles) -> Table:
    rows = [
        [_mark(group, styles), Cell(n), *(_percent(group, n, depth) for depth in depths), _number(group, n)]
        for group in groups
        for n in group.all_passes
    ]
    floors = [_floor_cell([floor for group in groups if (floor := group.floor(depth))]) for depth in depths]
    rows.append([Cell(FLOOR_LABEL), Cell(""), *floors, Cell("")])
    caption = (
        f"Percent of answers right, by {depth_name} and the N read with. {INTERVAL} {SEEDS} Loss is per loss token."
    )
    return Table(columns, rows, caption)


def _every_run(groups: list[Group], depths: list[str], columns: list[str]) -> Table:
    rows = []
    for run in (run for group in groups for run in group.evaluated):
        alone = Group(run.recipe.run.name, {}, [run])
        rows += [
            [Cell(str(run.path)), Cell(n), *(_percent(alone, n, depth) for depth in depths), _number(alone, n)]
            for n in alone.all_passes
        ]
        floors = [_floor_cell([floor] if (floor := alone.floor(depth)) else []) for depth in depths]
        rows.append([Cell(f"its {FLOOR_LABEL}"), Cell(""), *floors, Cell("")])
    return Table(columns, rows, f"Percent of answers right. {INTERVAL}", summary="Every run by itself")


def _held_out_loss(groups: list[Group]) -> Section:
    passes = sorted({n for group in groups for n in group.all_passes}, key=int)
    rows = [[Cell(group.label), *(_number(group, n) for n in passes)] for group in groups if group.evaluated]
    caption = f"Loss per token of the held-out text, by the N read with. {SEEDS}"
    return Section("Held-out loss", tables=[Table(["", *(f"N={n}" for n in passes)], rows, caption)])


def _training(groups: list[Group], styles: Styles) -> Section:
    trained = [group for group in groups if group.started]
    if not trained:
        return Section("Training", ["No run has done a step yet."])
    tables = [_at_equal_cost(trained, styles)] if len(trained) > 1 else []
    tables += [_phases(group) for group in trained if len(group.runs[0].recipe.phases) > 1]
    return Section("Training", pictures=loss_curves(trained, styles), tables=tables)


def _at_equal_cost(groups: list[Group], styles: Styles) -> Table:
    """The training loss of each group after as many steps, and after as many FLOPs, as all have done."""
    steps = min(group.course[-1].step for group in groups)
    flops = min(group.course[-1].flops for group in groups)
    rows = []
    for group in groups:
        by_step = [point for point in group.course if point.step <= steps]
        by_flops = [point for point in group.course if point.flops <= flops]
        cells = [_loss(by_step[-1].loss), Cell(in_units(by_step[-1].flops))] if by_step else [Cell("-"), Cell("-")]
        cells += [_loss(by_flops[-1].loss), Cell(f"{by_flops[-1].step:,}")] if by_flops else [Cell("-"), Cell("-")]
        rows.append([_mark(group, styles), *cells])
    columns = [
        "",
        f"loss after {steps:,} steps",
        "FLOPs by then",
        f"loss after {in_units(flops)} FLOPs",
        "steps by then",
    ]
    return Table(columns, rows, f"Training loss, smoothed as in the curves, at the most that all have done. {SEEDS}")


def _loss(loss: Share) -> Cell:
    return Cell(f"{loss.mean:.4f}", f"{loss.low:.4f}–{loss.high:.4f}" if loss.low != loss.high else "")


def _phases(group: Group) -> Table:
    """What changes over the steps of a run."""
    rows = []
    for start, phase in group.runs[0].recipe.phases:
        sleep = phase.sleep
        drawn = ", ".join(f"{n} ({share:.0%})" if share < 1 else str(n) for n, share in sleep.pass_shares.items())
        through = "all" if sleep.backprop_passes is None else f"the last {sleep.backprop_passes}"
        rows.append(
            [Cell(f"{start + 1:,}"), Cell(drawn), Cell(str(phase.model.window)), Cell(sleep.eviction), Cell(through)]
        )
    columns = ["from step", "N", "window", "eviction", "back-propagated through"]
    return Table(columns, rows, f"{group.label}: what changes over its steps.")


def _cost(groups: list[Group]) -> Section:
    columns = ["", "parameters", "FLOPs a step", "steps", "training FLOPs", "tokens/s", "time", "peak memory", "ranks"]
    rows = []
    for group in groups:
        first, started = group.runs[0], [run for run in group.furthest if run.metrics]
        speeds = [run.tokens_per_second for run in started]
        peaks = [run.peak_memory for run in started if run.peak_memory]
        choices = sorted(set(first.recipe.sleep.pass_choices))
        rows.append([
            Cell(group.label),
            Cell(in_units(first.parameters)),
            Cell(" to ".join(in_units(first.step_flops(n)) for n in dict.fromkeys((choices[0], choices[-1])))),
            Cell(f"{group.furthest[0].steps:,}"),
            Cell(in_units(_mean(run.flops for run in group.furthest))),
            Cell(f"{_mean(speeds):,.0f}" if speeds else "-"),
            Cell(_time(_mean(run.seconds for run in group.furthest))),
            Cell(in_bytes(max(peaks)) if peaks else "-"),
            Cell(str(first.recipe.parallel.world_size)),
        ])  # fmt: skip
    guessed = [run.path.name for group in groups for run in group.runs if not run.windows_known]
    paragraphs = [
        "FLOPs are counted from the recipe: matrix products and convolutions, forward, backward and what is recomputed. "
        "Tokens a second and time are of the training steps, without evaluations and checkpoints; peak memory is the "
        "first rank's. Means over the seeds with the most steps, and the largest memory. Speeds of different machines do not compare: see below."
    ]
    if guessed:
        paragraphs.append(
            f"FLOPs of {', '.join(guessed)} assume that only the last window predicts: an older version did not write them "
            "down, and the shards are not found from this folder."
        )
    return Section("Cost", paragraphs, tables=[Table(columns, rows)])


def _origin(runs: list[ReportedRun]) -> Section:
    columns = ["run", "seed", "steps", "checkpoint read", "answers", "date", "commit", "machine"]
    rows = []
    for run in runs:
        evaluation, origin = run.evaluation or {}, run.origin
        commit = origin["commit"][:10] if origin else "not recorded"
        commit += ", changed" if origin.get("uncommitted_changes") else ""
        rows.append([
            Cell(str(run.path)), Cell(str(run.recipe.run.seed)), Cell(f"{run.steps:,} of {run.recipe.train.steps:,}"),
            Cell(f"step {evaluation['step']:,}" if evaluation else "-"), Cell(_asked(evaluation)),
            Cell(origin.get("date", "-")), Cell(commit), Cell(_machine(origin.get("machine"))),
        ])  # fmt: skip
    sentence = "Losses, times and memory are from each run's metrics.jsonl, accuracy from its evaluation.json."
    sentences = [sentence, *(event for run in runs for event in _history(run))]
    return Section("Where the numbers come from", sentences, tables=[Table(columns, rows, left=len(columns))])


def _history(run: ReportedRun) -> list[str]:
    """What a run began with, and what was changed while it went on."""
    sentences = []
    if source := run.origin.get("started_from"):
        what = "continues" if source.get("branch") else "began with the weights of"
        step = f", step {source['step']:,}" if source["step"] else ""
        sentences.append(f"{run.path} {what} {source['folder']}{step}.")
    for line in run.history:
        if changes := line.get("changes"):
            fields = "; ".join(f"{field}: {before} to {now}" for field, (before, now) in changes.items())
            sentences.append(f"{run.path} after step {line['step']:,}: {fields}.")
    return sentences


def _asked(evaluation: dict) -> str:
    if not evaluation:
        return "-"
    if not evaluation["answers"]:
        return "none: loss only"
    return (
        f"{sum(evaluation['answers'].values()):,}, of up to {max(evaluation['sequences'].values()):,} sequences a depth"
    )


def _machine(machine: dict | None) -> str:
    if not machine:
        return "not recorded"
    return f"{machine['gpu'] or machine['cpu'] + ', ' + str(machine['cores']) + ' cores'}, torch {machine['torch']}"


def _mark(group: Group, styles: Styles) -> Cell:
    return Cell(group.label, color=styles[group.label]["color"])


def _percent(group: Group, passes: str, depth: str) -> Cell:
    share = group.accuracy(passes, depth)
    if share is None:
        return Cell("-")
    low, high = f"{100 * share.low:.1f}", f"{100 * share.high:.1f}"
    count = len(group.evaluated)
    reach = f"[{low}, {high}]" if count == 1 else f"{low}–{high}" if low != high else ""
    partly = f"of {count}" if count < len(group.runs) else ""
    return Cell(f"{100 * share.mean:.1f}", f"{reach} {partly}".strip())


def _floor_cell(floors: list[Share]) -> Cell:
    """The best surface guess, as a range if the tests differ."""
    if not floors:
        return Cell("-")
    low, high = (f"{100 * end:.1f}" for end in (min(f.low for f in floors), max(f.high for f in floors)))
    return Cell(low if low == high else f"{low}–{high}")


def _number(group: Group, passes: str) -> Cell:
    loss = group.held_out_loss(passes)
    if loss is None:
        return Cell("-")
    return _loss(loss)


def _mean(values) -> float:
    return statistics.fmean(values)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
