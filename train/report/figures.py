"""A report's figures: SVG that takes the page's text colour, so that light and dark mode both work, and PNG files."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from powernap.parallel.planning.plan import in_units
from powernap.train.evaluation.pictures import MOST_TICKS, share_axis
from powernap.train.evaluation.tables import FLOOR_LABEL
from powernap.train.report.runs import Group, Share

# Contrast at least 3.8:1 on white and on the dark page; markers and dashes help those who cannot tell colours apart.
COLORS = ("#2f7fd0", "#d4600f", "#1a8f63", "#9a5fc4", "#cf4a5f", "#0f8b9a", "#96771a", "#c2549c")
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
INK = "#1b2127"  # text and axes; in the page, the colour of its text
FLOOR = "#7a7f87"
BAND = 0.16  # opacity

Styles = dict[str, dict]  # group -> how matplotlib draws it


@dataclass(frozen=True)
class Picture:
    name: str  # of its file
    title: str
    caption: str
    alt: str  # alternative text for screen readers
    draw: Callable  # (axes) -> None

    def svg(self) -> str:
        """SVG to embed in a page: without a size, and without external references."""
        from matplotlib import rc_context

        file = io.BytesIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self._figure().savefig(file, format="svg", transparent=True, metadata={"Date": None})
        text = file.getvalue().decode()
        body = text[text.index(">", text.index("<svg")) + 1 :]
        view_box = re.search(r'viewBox="([^"]+)"', text)
        assert view_box is not None
        body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
        body = body.replace("xlink:href", "href").replace(INK, "currentColor")
        return f'<svg viewBox="{view_box[1]}" role="img" aria-label="{escape(self.alt)}">{body}'

    def save_png(self, to: Path) -> None:
        self._figure().savefig(to, dpi=160, facecolor="white")

    def _figure(self):
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        ink: dict[Any, str] = {f"{what}.color": INK for what in ("text", "xtick", "ytick")}
        with rc_context({**ink, "axes.labelcolor": INK, "axes.edgecolor": INK, "font.size": 10}):
            figure = Figure(figsize=(5.2, 3.9), layout="constrained")
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            self.draw(axes)
            by_label = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            labels = sorted(by_label, key=lambda label: label == FLOOR_LABEL)  # last
            columns = 3 if max(map(len, labels)) < 16 else 2
            handles = [by_label[label] for label in labels]
            figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=9)
        return figure


def styles_of(groups: list[Group]) -> Styles:
    """The same colour, marker and dashes for a group in all figures."""
    return {
        group.label: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
            "label": group.label,
        }
        for i, group in enumerate(groups)
    }


def named(depth: str, depth_name: str) -> str:
    """4, hops -> 4 hops"""
    return f"depth {depth}" if depth_name == "depth" else f"{depth} {depth_name}"


def accuracy_by_depth(groups: list[Group], depths: list[str], depth_name: str, styles: Styles) -> Picture:
    """Accuracy of each group at the N it was trained with."""
    positions = [int(depth) for depth in depths]

    def draw(axes):
        for group in groups:
            style = {**styles[group.label], "label": f"{group.label} (N={group.read_passes})"}
            _line(axes, positions, [group.accuracy(group.read_passes, depth) for depth in depths], style)
        _draw_floor(axes, groups, depths, positions)
        _share_axis(axes)
        if len(positions) <= MOST_TICKS:
            axes.set_xticks(positions)
        axes.set_xlabel(depth_name)

    return Picture(
        "accuracy_by_depth",
        f"Right answers by {depth_name}",
        f"Each read with the N in brackets. {_band_means(groups)}{_floor_means(groups, depths)}",
        "; ".join(
            f"{group.label}: "
            + ", ".join(f"{depth}: {_percent(group.accuracy(group.read_passes, depth))}" for depth in depths)
            for group in groups
        ),
        draw,
    )


def accuracy_by_passes(groups: list[Group], depth: str, depth_name: str, styles: Styles) -> Picture:
    """Accuracy at one depth by the N read with."""
    passes = sorted({int(n) for group in groups for n in group.all_passes})

    def draw(axes):
        axes.set_xscale("log", base=2)
        for group in groups:
            style = styles[group.label]
            _line(axes, passes, [group.accuracy(str(n), depth) for n in passes], style)
            trained = str(group.evaluated[0].trained_passes)
            if at_trained := group.accuracy(trained, depth):
                ring = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.4, "clip_on": False}
                axes.plot([int(trained)], [at_trained.mean], "o", color=style["color"], **ring)
        _draw_floor(axes, groups, [depth] * 2, axes.get_xlim())
        _share_axis(axes)
        axes.set_xticks(passes, [str(n) for n in passes])
        axes.minorticks_off()
        axes.set_xlabel("N, passes of sleep when reading")

    return Picture(
        f"accuracy_by_N_{depth}",
        f"Right answers at {named(depth, depth_name)} by N",
        f"A ring marks the N that a recipe was trained with, the largest of several. {_band_means(groups)}{_floor_means(groups, [depth])}",
        "; ".join(
            f"{group.label}: " + ", ".join(f"N={n}: {_percent(group.accuracy(n, depth))}" for n in group.all_passes)
            for group in groups
        ),
        draw,
    )


def loss_curves(groups: list[Group], styles: Styles) -> list[Picture]:
    """Smoothed training loss by step, and by training FLOPs."""
    by = {
        "step": ("optimizer step", "step", lambda point: point.step),
        "flops": ("training FLOPs", "training FLOPs", lambda point: point.flops),
    }
    return [_loss_curve(groups, styles, name, *about) for name, about in by.items()]


def _loss_curve(groups: list[Group], styles: Styles, name: str, label: str, what: str, position: Callable) -> Picture:
    def draw(axes):
        for group in groups:
            style = {**styles[group.label], "marker": ""}
            course = group.course
            _line(axes, [position(point) for point in course], [point.loss for point in course], style, width=1.4)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        if name == "flops":
            axes.xaxis.set_major_formatter(lambda flops, _: in_units(flops))
        axes.set_xlabel(label)
        axes.set_ylabel("training loss, nats per loss token")

    several = any(len(group.started) > 1 for group in groups)
    return Picture(
        f"loss_by_{name}",
        f"Training loss by {what}",
        "Each point is the mean of the last thirtieth of the steps."
        + (" Of several seeds: the mean, the range as a band, as far as all have come." if several else ""),
        "; ".join(
            f"{group.label}: from {group.course[0].loss.mean:.2f} to {group.course[-1].loss.mean:.2f}"
            for group in groups
        ),
        draw,
    )


def accuracy_by_cost(groups: list[Group], depth: str, depth_name: str, styles: Styles) -> Picture:
    """Accuracy by training FLOPs."""
    cost = {group.label: sum(run.flops for run in group.evaluated) / len(group.evaluated) for group in groups}

    def draw(axes):
        for group in groups:
            share = group.accuracy(group.read_passes, depth)
            assert share is not None
            reach = [[max(0, share.mean - share.low)], [max(0, share.high - share.mean)]]
            style = {**styles[group.label], "linestyle": "none", "markersize": 8}
            axes.errorbar([cost[group.label]], [share.mean], reach, capsize=3, clip_on=False, **style)
        axes.set_xlim(left=0, right=1.08 * max(cost.values()))
        _draw_floor(axes, groups, [depth] * 2, axes.get_xlim())
        _share_axis(axes)
        axes.xaxis.set_major_formatter(lambda flops, _: in_units(flops))
        axes.set_xlabel("training FLOPs")

    return Picture(
        "accuracy_by_cost",
        f"Right answers at {named(depth, depth_name)} by training FLOPs",
        f"FLOPs of the whole training, recomputation included. {_band_means(groups)}{_floor_means(groups, [depth])}",
        "; ".join(
            f"{group.label}: {cost[group.label]:.2g} FLOPs, {_percent(group.accuracy(group.read_passes, depth))}"
            for group in groups
        ),
        draw,
    )


def _line(axes, positions, shares: Sequence[Share | None], style: dict, width: float = 1.8) -> None:
    """Plot means as a line and their ranges as a band; points without a share are left out."""
    known = [(x, share) for x, share in zip(positions, shares, strict=True) if share]
    if not known:
        return
    xs, means, lows, highs = zip(*((x, s.mean, s.low, s.high) for x, s in known), strict=True)
    axes.plot(xs, means, linewidth=width, markersize=5, clip_on=False, **style)
    if len(known) == 1:
        error = [[max(0, means[0] - lows[0])], [max(0, highs[0] - means[0])]]
        axes.errorbar(xs, means, error, fmt="none", color=style["color"], capsize=3)
    else:
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=BAND, linewidth=0)


def _draw_floor(axes, groups: list[Group], depths: Sequence[str], positions: Sequence[float]) -> None:
    """The best surface guess; if the groups' tests differ, from the lowest to the highest."""
    lows, highs = zip(*(_floors(groups, depth) for depth in depths), strict=True)
    axes.plot(positions, highs, ":", color=FLOOR, label=FLOOR_LABEL)
    if lows != highs:
        axes.fill_between(positions, lows, highs, color=FLOOR, alpha=BAND, linewidth=0)


def _floors(groups: list[Group], depth: str) -> tuple[float, float]:
    floors = [floor for group in groups if (floor := group.floor(depth))]
    return min(floor.low for floor in floors), max(floor.high for floor in floors)


def _floor_means(groups: list[Group], depths: Sequence[str]) -> str:
    """How to read the floor's line where the groups' tests differ."""
    ends = [_floors(groups, depth) for depth in depths]
    return " The floor differs by test: its line is the highest." if any(low != high for low, high in ends) else ""


def _band_means(groups: list[Group]) -> str:
    counts = {len(group.evaluated) for group in groups}
    if counts == {1}:
        return "Bands and bars: 95 % interval of the test."
    if 1 not in counts:
        return "Bands and bars: from the lowest seed to the highest."
    return "Bands and bars: from the lowest seed to the highest, and of a single run the 95 % interval of the test."


def _share_axis(axes) -> None:
    share_axis(axes)
    axes.grid(axis="y", color=FLOOR, alpha=0.25, linewidth=0.6)
    axes.set_ylabel("answers right")


def _percent(share: Share | None) -> str:
    return "unknown" if share is None else f"{100 * share.mean:.1f} %"
