"""Pictures of a run: accuracy by depth with its intervals, and loss."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from powernap.train.evaluation.tables import FLOOR_LABEL, Accuracy, Intervals, some_depths

BLUE, ORANGE = "#08519c", "#d95f0e"
GREEN = "#238b45"
GREY = "#777777"  # for floors
MOST_TICKS = 20


def draw_loss(loss: Mapping[str, float], by_window: Mapping[str, Mapping[str, float]], *, title: str, to: Path) -> None:
    """Loss over the windows of a document, a line for each N; over N where all have one window."""
    figure, axes = new_figure()
    if all(len(losses) > 1 for losses in by_window.values()) and by_window:
        for (passes, losses), color in zip(by_window.items(), _from_light_to_dark(len(by_window)), strict=True):
            axes.plot(list(losses), list(losses.values()), "o-", color=color, label=f"N = {passes}", clip_on=False)
        axes.set_xlabel("window of the document")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.plot(list(loss), list(loss.values()), "o-", color=BLUE, clip_on=False)
        axes.set_xlabel("N, passes of sleep")
    axes.set_ylabel("loss per token")
    axes.set_title(title, loc="left")
    figure.savefig(to)


T = TypeVar("T")
Curves = tuple[Accuracy, Intervals, Mapping[str, float]]  # N -> depth -> share; the interval; depth -> floor


def draw_accuracy(
    accuracy: Accuracy,
    intervals: Intervals,
    floor: Mapping[str, float],
    *,
    title: str,
    to: Path,
    lengths: Mapping[str, Curves] | None = None,
    depth_name: str = "depth",
) -> None:
    """Accuracy over depth, a line with its interval for each N, and the best surface guess below them.

    With a single depth, N becomes the axis. lengths: those of sequences with other numbers of windows; each has a panel,
    or if each has one depth alone, all share one, over the number of windows.
    """
    panels = _panels(lengths or {}, depth_name)
    figure, axes = new_figure(columns=1 + len(panels))
    first, *others = axes if panels else [axes]
    _draw_panel(first, accuracy, intervals, floor, depth_name)
    for axis, (name, label, curves) in zip(others, panels, strict=True):
        _draw_panel(axis, *curves, depth_name)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel(label)
    for axis in (first, *others)[:-1]:
        if legend := axis.get_legend():
            legend.remove()
    if panels:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        first.set_title("trained length", loc="left", fontsize=10)
    else:
        first.set_title(title, loc="left", fontsize=11)
    figure.savefig(to, dpi=150)


def _panels(lengths: Mapping[str, Curves], depth_name: str) -> list[tuple[str, str, Curves]]:
    """Title, label of the horizontal axis and curves of each panel."""
    if len(lengths) > 1 and all(len(floor) == 1 for _, _, floor in lengths.values()):
        passes = next(iter(lengths.values()))[0].keys()
        accuracy = {n: {windows: _only(of[n]) for windows, (of, _, _) in lengths.items()} for n in passes}
        intervals = {n: {windows: _only(of[n]) for windows, (_, of, _) in lengths.items()} for n in passes}
        floor = {windows: _only(of) for windows, (_, _, of) in lengths.items()}
        return [("other lengths", "windows", (accuracy, intervals, floor))]
    return [(f"{windows} windows", _label(depth_name), curves) for windows, curves in lengths.items()]


def _label(depth_name: str) -> str:
    return f"{depth_name}; bands: 95 %"


def _only(values: Mapping[str, T]) -> T:
    (value,) = values.values()
    return value


def _draw_panel(axes, accuracy: Accuracy, intervals: Intervals, floor: Mapping[str, float], depth_name: str) -> None:
    depths = list(floor)
    if len(depths) == 1:
        (depth,) = depths
        heights = [values[depth] for values in accuracy.values()]
        ends = [interval[depth] for interval in intervals.values()]
        axes.plot(list(accuracy), heights, "o-", color=BLUE, clip_on=False)
        axes.errorbar(list(accuracy), heights, _reach(heights, ends), fmt="none", color=BLUE, capsize=3)
        axes.axhline(floor[depth], color=GREY, linestyle=":")
        axes.annotate(FLOOR_LABEL, (0, floor[depth]), xytext=(0, 4), textcoords="offset points", color=GREY)
        axes.set_xlabel(f"N, passes of sleep ({depth_name} {depth}; bars: 95 %)")
    else:
        for (passes, values), color in zip(accuracy.items(), _from_light_to_dark(len(accuracy)), strict=True):
            marker = "o" if len(depths) <= MOST_TICKS else "."
            axes.plot(
                depths, [values[d] for d in depths], marker + "-", color=color, label=f"N = {passes}", clip_on=False
            )
            _band(axes, depths, intervals[passes], color)
        axes.plot(depths, [floor[d] for d in depths], ":", color=GREY, label=FLOOR_LABEL)
        axes.set_xlabel(_label(depth_name))
        axes.set_xticks([depths.index(depth) for depth in some_depths(depths, MOST_TICKS)])
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    share_axis(axes)


def draw_demo(
    curves: Mapping[str, tuple[Mapping[str, float], Mapping[str, tuple[float, float]], Mapping[str, float]]],
    losses: Mapping[str, list[float]],
    *,
    trained: Collection[str],
    depth_name: str,
    title: str,
    to: Path,
) -> None:
    """The demo's picture: held-out accuracy by depth (left) and training loss (right), a colour for each model.

    Args:
        curves: model name -> accuracy, 95 % interval and floor by depth.
        losses: model name -> loss at every step, in the same order.
        trained: the depths of sequences as long as the training's; deeper ones are set apart.
    """
    figure, (left, right) = new_figure(columns=2)
    colors = dict(zip(curves, (BLUE, ORANGE, GREEN), strict=False))
    equal_steps = len({len(values) for values in losses.values()}) == 1
    for name, (accuracy, intervals, _) in curves.items():
        depths = list(accuracy)
        left.plot(depths, list(accuracy.values()), "o-", color=colors[name], linewidth=2, clip_on=False)
        _band(left, depths, intervals, colors[name])
        number = list(curves).index(name)
        for depth in (
            depths[1:] if len(depths) < 5 else dict.fromkeys([list(trained)[-1], depths[-1]][: max(1, 2 - number)])
        ):
            left.annotate(
                f"{accuracy[depth]:.0%}", (depth, accuracy[depth]), xytext=(0, 6 if number > 1 else -14),
                textcoords="offset points", ha="center", color=colors[name], fontsize=9,
            )  # fmt: skip
        steps = range(1, len(losses[name]) + 1)
        places = list(steps) if equal_steps else [100 * step / len(steps) for step in steps]
        right.plot(places, smooth(losses[name]), color=colors[name], label=name)
    floor = next(iter(curves.values()))[2]
    left.plot(list(floor), list(floor.values()), ":", color=GREY)
    free = max(floor, key=lambda depth: min(accuracy[depth] for accuracy, _, _ in curves.values()) - floor[depth])
    left.annotate(
        FLOOR_LABEL,
        (free, floor[free]),
        xytext=(0, -12),
        textcoords="offset points",
        ha="center",
        color=GREY,
        fontsize=9,
    )
    if longer := len(floor) - len(trained):
        left.axvspan(len(trained) - 0.5, len(floor) - 0.5, color=GREY, alpha=0.08, linewidth=0)
        left.annotate(
            "never trained", (len(trained) - 0.5 + longer / 2, 0.0), xytext=(0, 6), textcoords="offset points",
            ha="center", color=GREY, fontsize=9,
        )  # fmt: skip
    left.set_xlabel(depth_name)
    left.set_title("held-out answers right", loc="left", fontsize=11)
    share_axis(left)
    right.set_xlabel("optimizer step" if equal_steps else "training, % of its FLOPs")
    right.set_title("training loss (nats per answer)", loc="left", fontsize=11)
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.savefig(to, dpi=150)


def smooth(values: list[float], window: int = 20) -> list[float]:
    """The running mean of the last `window` values, without the non-finite ones of skipped steps."""
    parts = [values[max(0, i - window + 1) : i + 1] for i in range(len(values))]
    parts = [[value for value in part if math.isfinite(value)] for part in parts]
    return [sum(part) / len(part) if part else math.nan for part in parts]


def _band(axes, depths: list[str], interval: Mapping[str, tuple[float, float]], color) -> None:
    low, high = zip(*(interval[depth] for depth in depths), strict=True)
    axes.fill_between(depths, low, high, color=color, alpha=0.2, linewidth=0)


def _reach(heights: list[float], ends: list[tuple[float, float]]) -> list[list[float]]:
    """The distances from each point down and up to the ends of its interval, as errorbar takes them."""
    down = [max(0.0, height - low) for height, (low, _) in zip(heights, ends, strict=True)]
    return [down, [max(0.0, high - height) for height, (_, high) in zip(heights, ends, strict=True)]]


def _from_light_to_dark(count: int) -> list:
    """Distinguishable colours, also in grey: more passes, darker."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * (1 - index / max(1, count - 1))) for index in range(count)]


def new_figure(columns: int = 1):
    """A figure that needs no display, without the top and right spines."""
    from matplotlib.figure import Figure  # late: a second of import

    figure = Figure(figsize=(5 * columns + 1.5, 4), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def share_axis(axes) -> None:
    """0 to 100 % on the vertical axis."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
