"""A run from Python: python train.py [key=value ...], or in several processes torchrun --nproc-per-node 2 train.py parallel.data=2.

A window of letters is slept on, then one of them is asked for by its place. The task, two callbacks and a loss term are of this
file; the trainer is that of `powernap train`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from powernap import Callback, LossTerm, Sample, Section, build_task, draw_problem, fit, load_recipe


class Recall(Section):
    """[letter ...] | [place] letter; the depth of the answer is the place, counted from the end."""

    letters: int = Field(4, ge=2, description="different letters")
    length: int = Field(4, ge=1, description="letters in the window")

    @property
    def vocab_size(self) -> int:
        return 1 + self.letters + self.length  # 0 is the pad

    @property
    def window(self) -> int:
        return self.length

    @property
    def context_length(self) -> int:
        return self.length

    @property
    def sequence_length(self) -> int:
        return self.length + 2

    def token_name(self, token: int) -> str:
        return f"[{token - self.letters}]" if token > self.letters else "-abcdefghijklmnopqrstuvwxyz"[token]

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        word = draw_problem(
            lambda: rng.integers(1, self.letters + 1, self.length), lambda word: word, held_out, "recall"
        )
        place = int(rng.integers(1, self.length + 1))
        tokens = np.array([*word, self.letters + place, word[-place]], dtype=np.int32)
        answer = self.length + 1
        return Sample(tokens, np.arange(len(tokens)) == answer, np.array([(answer, answer + 1, place)], dtype=np.int32))


class LossMean(Callback):
    """A running mean of the loss: a metric more, which continues after a resume."""

    def __init__(self, keep: float = 0.95):
        self.keep, self.mean = keep, None

    def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        loss = metrics["loss"]
        self.mean = loss if self.mean is None else self.keep * self.mean + (1 - self.keep) * loss
        metrics["loss_mean"] = self.mean

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


class StopAt(Callback):
    """Stop as soon as the held-out loss is low enough."""

    def __init__(self, loss: float):
        self.loss = loss

    def on_evaluate(self, trainer: Any, metrics: dict[str, float]) -> None:
        if metrics["held_out_loss/N2"] < self.loss:
            trainer.log.event("held-out loss below %s", self.loss)
            trainer.stop()


def confidence(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Minus the entropy of the next token, [n, vocabulary] -> [n] (arXiv 1701.06548)."""
    logs = logits.log_softmax(-1)
    return (logs.exp() * logs).sum(-1)


def main(overrides: list[str]) -> bool:
    recipe = load_recipe(str(Path(__file__).parent / "recipe.yaml"), overrides)
    if not Path("data").exists():  # in one process first: torchrun's ranks would all write
        sizes = {"train_samples": 4000, "test_samples": 256, "samples_per_shard": 2000}
        build_task("recall", Recall(), Path("data"), **sizes, seed=0, workers=1)
    until = recipe.train.steps // 2
    penalty = LossTerm("confidence", confidence, weight=lambda step: 0.05 * max(0.0, 1 - step / until))
    return fit(recipe, [LossMean(), StopAt(loss=0.05)], [penalty], resume=recipe.run_folder.exists())


if __name__ == "__main__":
    print("finished" if main(sys.argv[1:]) else "stopped early")
