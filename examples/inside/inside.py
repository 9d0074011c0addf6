"""What each pass of sleep reads and writes: python inside.py RUN [RUN ...], for runs trained on task track.

After every pass over a window a linear classifier is asked, from held-out words, for the permutation before the window and
the one after it: once from the hidden states of the window's last token, once from the fast weights. A pass that has read the
old permutation and not yet written the new one shows it. Prints a table and writes inside.png.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from powernap import load_run
from powernap.model.batch import plan_segments
from powernap.model.stage import HybridStage
from powernap.train.tasks.track import Track

WORDS, WINDOWS, SKIPPED = 1500, 8, 2  # the first windows are easy: there are few permutations yet
RIDGE = 1e-2
BEFORE, AFTER = "before the window", "after it"

Features = dict[str, list[np.ndarray]]  # place -> [B, features] for each window


def words(task: Track, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]], np.ndarray]:
    """Held-out words: tokens and loss mask [B, T], the probes, and the permutation after 0 .. 8 windows [B, 9]."""
    rng = np.random.default_rng(seed)
    samples = [task.sample(rng, held_out=True) for _ in range(WORDS)]
    stride = task.window + 2 * task.questions
    moves = np.stack([sample.tokens.reshape(WINDOWS, stride)[:, 1 : 1 + task.moves] for sample in samples]) - 2
    numbers: dict[tuple[int, ...], int] = {}
    after = [
        [numbers.setdefault(tuple(places), len(numbers)) for places in history(task, of_word)] for of_word in moves
    ]
    tokens, loss_mask = (
        torch.tensor(np.stack([getattr(s, name) for s in samples])) for name in ("tokens", "loss_mask")
    )
    return tokens.long(), loss_mask, [(a, b) for a, b in samples[0].probes.tolist()], np.array(after)


def history(task: Track, moves: np.ndarray) -> list[np.ndarray]:
    """Where each element is after 0 .. 8 windows."""
    places = [np.arange(task.points)]
    for window in moves:
        places.append(task.after(window, places[-1]))
    return places


@torch.no_grad()
def passes(
    stage: HybridStage, n: int, tokens: torch.Tensor, loss_mask: torch.Tensor, probes: list[tuple[int, int]]
) -> tuple[Features, dict[int, list[float]]]:
    """Hidden states and fast weights after each pass; pass -> how far it moved the fast weights, relative, by window."""
    segments = plan_segments(tokens, loss_mask, stage.model, stage.sleep, n, probes)
    states, hidden_states = stage.empty_layer_states(len(tokens)), None
    found: Features = {}
    moved: dict[int, list[float]] = {}
    for segment in segments:
        if segment.probe:
            continue
        # Training leaves out what follows the last write; here the hidden states of the last pass are wanted.
        whole = replace(segment, state_only=False, blocks=range(stage.model.num_layers))
        before = states
        hidden_states, states = stage(whole, tokens[:, :-1], hidden_states, states)
        change = sum((new - old).norm() for new, old in zip(states, before, strict=True))
        size = sum(new.norm() for new in states)
        moved.setdefault(segment.pass_number, []).append(float(change / size))
        name = f"pass {segment.pass_number}"
        found.setdefault(f"{name}, hidden states", []).append(hidden_states[-1].numpy())
        found.setdefault(f"{name}, fast weights", []).append(torch.cat([s.flatten(1) for s in states], 1).numpy())
    return found, moved


def decoded(features: np.ndarray, labels: np.ndarray) -> float:
    """Share of the second half that a ridge classifier trained on the first half gets right."""
    half = len(features) // 2
    scale = features[:half].std(axis=0) + 1e-6
    inputs = np.concatenate([(features - features[:half].mean(axis=0)) / scale, np.ones((len(features), 1))], axis=1)
    targets = np.eye(labels.max() + 1)[labels]
    gram = inputs[:half].T @ inputs[:half] + RIDGE * half * np.eye(inputs.shape[1])
    weights = np.linalg.solve(gram, inputs[:half].T @ targets[:half])
    return float(((inputs[half:] @ weights).argmax(axis=1) == labels[half:]).mean())


def inside(run: Path) -> tuple[dict[str, dict[str, float]], dict[int, float]]:
    """Place -> question -> share decoded; pass -> mean move of the fast weights."""
    model = load_run(run)
    task = Track(asked="each", windows=WINDOWS, min_windows=WINDOWS)
    sizes = model.stage.model
    if (sizes.vocab_size, sizes.window) != (task.vocab_size, task.window):
        sys.exit(f"inside.py: error: {run}: write a run of task track with group=s3 moves=1")
    tokens, loss_mask, probes, permutations = words(task, seed=0)
    found, moved = passes(model.stage, model.passes, tokens, loss_mask, probes)
    table = {}
    for place, by_window in found.items():
        features = np.concatenate(by_window[SKIPPED:])
        asked = {BEFORE: permutations[:, SKIPPED:-1], AFTER: permutations[:, SKIPPED + 1 :]}
        order = np.random.default_rng(0).permutation(len(features))  # windows and words mixed in both halves
        table[place] = {name: decoded(features[order], labels.T.ravel()[order]) for name, labels in asked.items()}
    return table, {number: float(np.mean(by_window[SKIPPED:])) for number, by_window in moved.items()}


def main(runs: list[Path]) -> None:
    figure = Figure(figsize=(5.5 * len(runs), 4), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for run, panel in zip(runs, panels, strict=True):
        table, moved = inside(run)
        print(f"{run.name}: which of the six permutations? guessing gets 17 %")
        print(f"{'':24}{BEFORE:>20}{AFTER:>12}")
        for place, shares in table.items():
            print(f"{place:24}{shares[BEFORE]:>20.0%}{shares[AFTER]:>12.0%}")
        print(", ".join(f"pass {number} moves the fast weights by {share:.0%}" for number, share in moved.items()))
        places = np.arange(len(table))
        for shift, name in ((-0.2, BEFORE), (0.2, AFTER)):
            panel.bar(places + shift, [shares[name] for shares in table.values()], 0.38, label=name)
        panel.axhline(1 / 6, color="grey", linestyle=":")
        panel.set_xticks(places, [place.replace(", ", "\n") for place in table])
        panel.set_title(run.name, loc="left")
        panel.set_ylim(0, 1)
    panels[0].set_ylabel("permutation decoded, held-out words")
    panels[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig("inside.png", dpi=150)


if __name__ == "__main__":
    main([Path(run) for run in sys.argv[1:]])
