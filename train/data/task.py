"""What a task is: all that `powernap data build`, evaluation, the floors and generation ask of one. No torch here."""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from powernap.train.tasks.sample import Sample

if TYPE_CHECKING:
    from powernap.train.tasks.depo import Depo
    from powernap.train.tasks.gsm import Gsm
    from powernap.train.tasks.rule110 import Rule110
    from powernap.train.tasks.track import Track


class Task(Protocol):
    """A task's sizes, and the samples that it draws with them.

    Its class derives from powernap.model.section.Section: its fields are what `powernap data build` takes as key=value, and
    what a manifest keeps. All samples have one length.

    A task may have beside these:
        pad_token_id: int, the token that fills a sequence up; without it, 0.
        depth_name: str, of what an answer's depth counts, such as "hops"; without it, "depth".
        surface_guesses(sample: Sample) -> dict[str, Candidates]: by name, what a reader guesses who works nothing out, for
            each answer of the sample: the best of them is a depth's floor (train/evaluation/floors.py).
    """

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 .. vocab_size - 1."""

    @property
    def sequence_length(self) -> int:
        """T, tokens of a sample."""

    @property
    def context_length(self) -> int | None:
        """Tokens before the first question, which whole windows must hold to be slept on; None: every window bears loss."""

    @property
    def window(self) -> int:
        """L, tokens of a window, that the samples are made for."""

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """A sample of a problem that belongs to the test (`held_out`) or to the training.

        The same state of `rng` gives the same sample, on every machine. tasks/sample.py has `is_held_out` and
        `draw_problem`, which keep a fifth of all problems for the test.

        Raises:
            TaskError: if the sizes allow no sample.
        """

    def token_name(self, token: int) -> str:
        """A token as a person reads it and writes it in a prompt: one word, other tokens have others."""

    def model_dump(self, *, mode: str, exclude_defaults: bool = False) -> dict[str, Any]:
        """The fields by name; a Section has it."""


if TYPE_CHECKING:
    # Type checkers compare Powernap's own with it.
    OWN: tuple[type[Task], ...] = (Depo, Gsm, Rule110, Track)
