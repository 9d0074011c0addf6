# %% [markdown]
# # Watch one sequence being slept on
# `python watch.py RUN [--sample 3] [--to watch.png]`, for runs trained on task track; or cell by cell, as a notebook.
# Before the sleep on each window, and after 1, 2, .. N + 1 passes, the fast weights are asked where every element is by now.
# A question is a probe: read, answered and forgotten. What N passes leave is carried to the next window.

# %%
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from powernap import PowernapError, load_run
from powernap.train.data.loader import evaluation_batches
from powernap.train.data.test_sets import named_tests, test_sets
from powernap.train.data.vocabulary import find_task
from powernap.train.evaluation.pictures import BLUE, GREY, ORANGE
from powernap.train.generation.generate import RunModel
from powernap.train.outputs import check_file
from powernap.train.run.folder import RunFolder
from powernap.train.tasks.track import FIRST_GENERATOR, MOVE, Track


# %% The sequence: a held-out word, window by window, without its own questions.
def read_word(run: Path, number: int) -> tuple[Track, list[list[int]]]:
    """Sample `number` of the run's test, from 0."""
    recipe = RunFolder(run).recipe()
    task = find_task(recipe.data)
    if not isinstance(task, Track) or recipe.data.test is None:
        raise PowernapError(f"{run}: write a run of task track with data.test, such as runs/demo/sleep")
    if not recipe.model.fast_weight_blocks or recipe.model.window != task.window:
        raise PowernapError(f"{run}: write a run with fast weights and model.window={task.window}")
    data = test_sets(next(iter(named_tests(recipe.data).values())))[0]
    batches = evaluation_batches(data, batch_size=1, vocab_size=task.vocab_size, rank=0, world_size=1, limit=number + 1)
    samples = [batch.tokens[0].tolist() for batch in batches] if number >= 0 else []
    if number < 0 or len(samples) <= number:
        raise PowernapError(f"--sample {number}: the test has no such sample; they count from 0")
    return task, [samples[-1][i : i + task.window] for i, token in enumerate(samples[-1]) if token == MOVE]


# %% The sleep: from the same fast weights 0, 1, .. N + 1 passes over a window, and what they answer then.
class Moment(NamedTuple):
    window: int  # from 0
    passes: int  # over it; 0: before its sleep
    says: list[str]  # the window in words
    right: list[str]  # where each element is after it
    answers: list[str]  # the likeliest
    shares: list[float]  # probability of the right ones
    states: dict[int, torch.Tensor]  # block -> its fast weights [heads, rows, columns]
    moved: dict[int, float]  # block -> Frobenius norm of the last pass's change, as a share of that of the new state


def watch(model: RunModel, task: Track, windows: list[list[int]]) -> list[Moment]:
    decoder, elements, moments = model.stream(task.points).decoder, np.arange(task.points), []
    questions, places = (task.first_question + elements)[:, None].tolist(), elements  # row x asks where x is
    for number, window in enumerate(windows):
        places = task.after(np.array(window[1:]) - FIRST_GENERATOR, places)
        right, start, after = task.first_element + places, decoder.state(), []
        for passes in range(model.passes + 2):
            decoder.load_state(start)
            decoder.passes = max(1, passes)
            decoder.feed([window if passes else []] * task.points)
            with decoder.forgetting():  # a full window sleeps first
                read = decoder.feed(questions).softmax(-1).cpu()
            after.append(decoder.state())
            states = {block: after[-1][f"block_{block}.state"][0] for block in model.stage.model.fast_weight_blocks}
            before = moments[-1].states if passes else {}
            moved = {b: float((states[b] - old).norm() / states[b].norm()) for b, old in before.items()}
            words = ([task.token_name(token) for token in row] for row in (window, right, read.argmax(-1).tolist()))
            moments.append(Moment(number, passes, *words, read[elements, right].tolist(), states, moved))
        decoder.load_state(after[model.passes])
    return moments


# %% What was seen: tables, and a picture of the answers with each block's fast weights below them, head under head.
def print_table(title: str, moments: list[Moment], cells: list[str]) -> None:
    rows = [[str(m.window + 1), " ".join(m.says), " ".join(m.right)] for m in moments if m.passes == 0]
    for moment, cell in zip(moments, cells, strict=True):
        rows[moment.window].append(cell)
    rows.insert(0, ["window", "it says", "right", "before", *(f"pass {n + 1}" for n in range(moments[-1].passes))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print("", title, *("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows), sep="\n")


def draw(task: Track, moments: list[Moment], title: str, to: Path) -> None:
    blocks, columns, beside = moments[0].states, 1 + moments[-1].passes, min(4, moments[-1].window + 1)
    most = {block: max(float(m.states[block].abs().max()) for m in moments) for block in blocks}
    lines, width = 1 + moments[-1].window // beside, beside * (columns + 0.6)
    heights = [task.points + 1.6, *(1.5 * len(state) + 0.5 for state in blocks.values())] * lines
    figure = Figure((0.4 * width + 1.2, 0.3 * sum(heights) + 1.4), layout="constrained")
    blank = {"frame_on": False, "xticks": [], "yticks": [], "xlim": (-0.6, width - 1)}
    panels = figure.subplots(len(heights), 1, height_ratios=heights, subplot_kw=blank).reshape(lines, -1)
    for m in moments:
        x = m.window % beside * (columns + 0.6) + m.passes
        (strip, *below), sides = panels[m.window // beside], (x - 0.46, x + 0.46)
        if m.passes == 0:
            strip.text(sides[0], -0.7, f"{m.window + 1}: {' '.join(m.says)}\nright: {' '.join(m.right)}", va="bottom")
        for row, (name, right, share) in enumerate(zip(m.answers, m.right, m.shares, strict=True)):
            strip.fill_between(sides, row - 0.46, row + 0.46, color=BLUE, alpha=0.06 + 0.94 * share, linewidth=0)
            color = ORANGE if name != right else "white" if share > 0.4 else BLUE
            strip.text(x, row, name, ha="center", va="center", color=color, weight="bold", size=min(10, 30 / len(name)))
        for axes, (block, state) in zip(below, m.states.items(), strict=True):
            shown = (state.abs() / most[block]).sqrt() * state.sign()  # small ones show, too
            shown = torch.nn.functional.pad(shown, (0, 0, 0, 1), value=torch.nan).flatten(0, 1)[:-1]
            axes.imshow(shown.numpy(), "RdBu_r", vmin=-1, vmax=1, extent=(*sides, 1, 0), aspect="auto")
            axes.text(x, 1.03, f"{m.moved[block]:.0%}" if m.moved else "", ha="center", va="top", color=GREY, size=7)
    legend = "Columns: passes, 0 before the sleep. Blue: probability of the right answer. Below: fast weights, and what a pass changed"
    names = [task.token_name(task.first_question + element) for element in range(task.points)]
    ticks = {n * (columns + 0.6) + passes: str(passes) for n in range(beside) for passes in range(columns)}
    for strip, *below in panels:
        strip.set(ylim=(task.points - 0.5, -2.1), yticks=range(task.points), yticklabels=names)
        strip.tick_params(length=0)
        for axes, block in zip(below, blocks, strict=True):
            axes.set(ylim=(1.2, 0), ylabel=f"block {block}")
        below[-1].set_xticks(list(ticks), ticks.values())
        below[-1].tick_params(length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(legend, x=0.01, ha="left", fontsize=9)
    figure.savefig(to, dpi=150)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Watch one sequence being slept on, by a run trained on task track.")
    parser.add_argument("run", type=Path, help="its folder, such as runs/demo/sleep")
    parser.add_argument("--sample", type=int, default=3, help="of its test, from 0 (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=Path("watch.png"), help="the picture (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.to.suffix not in (".png", ".svg", ".pdf"):
            raise PowernapError(f"--to {options.to}: write a name that ends in .png, .svg or .pdf")
        check_file(options.to, "--to")
        (task, windows), model = read_word(options.run, options.sample), load_run(options.run)
    except PowernapError as error:
        sys.exit(f"watch.py: error: {error}")
    moments = watch(model, task, windows)
    title = f"{model.name}, N={model.passes}, sample {options.sample} of the test: where is each element?"
    print_table(title, moments, [f"{' '.join(m.answers)} {np.mean(m.shares):6.1%}" for m in moments])
    for block in moments[0].states:
        what = f"Block {block}: norm of the fast weights (Frobenius), and how much of it the pass changed"
        print_table(what, moments, [f"{m.states[block].norm():.2f} {m.moved.get(block, 0):5.0%}" for m in moments])
    draw(task, moments, title, options.to)
    print(f"\nPicture: {options.to}")


# %% In a notebook: name your run here, then open watch.png.
if __name__ == "__main__":
    main(["runs/demo/sleep"] if "ipykernel" in sys.modules else sys.argv[1:])
