"""The protocol of a task: all that `powernap data build`, evaluation, floors and generation need. No torch here."""

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from powernap.train.tasks.sample import Sample

if TYPE_CHECKING:
    from powernap.train.tasks.automata import Automata
    from powernap.train.tasks.depo import Depo
    from powernap.train.tasks.gsm import Gsm
    from powernap.train.tasks.program import Program
    from powernap.train.tasks.rule110 import Rule110
    from powernap.train.tasks.track import Track


class Task(Protocol):
    """A task: its sizes, and how it draws samples of them.

    Its class derives from powernap.model.section.Section: `powernap data build` takes its fields as key=value, and a
    manifest records them. All samples have the same length.

    Optional members:
        pad_token_id: int, the token that pads a sequence; default 0.
        depth_name: str, the unit of an answer's depth, such as "hops"; default "depth".
        surface_guesses(sample: Sample) -> dict[str, Candidates]: by name, guesses without any reasoning, for each
            answer of the sample: the best of them is a depth's floor (train/evaluation/floors.py).
    """

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 .. vocab_size - 1."""

    @property
    def sequence_length(self) -> int:
        """T, tokens per sample."""

    @property
    def context_length(self) -> int | None:
        """Tokens before the first question, in whole windows to be slept on; None: every window has loss tokens."""

    @property
    def window(self) -> int:
        """L, the window in tokens that the samples are made for."""

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """Draw a sample of a problem from the test split (`held_out`) or the training split.

        The same state of `rng` gives the same sample, on every machine. tasks/sample.py has `is_held_out` and
        `draw_problem`, which keep a fifth of all problems for the test.

        Raises:
            TaskError: if the sizes allow no sample.
        """

    def token_name(self, token: int) -> str:
        """A token's name for display and in prompts: one word, unique to the token."""

    def model_dump(self, *, mode: str, exclude_defaults: bool = False) -> dict[str, Any]:
        """The fields by name; inherited from Section."""


if TYPE_CHECKING:
    # Lets type checkers compare Powernap's own tasks with the protocol.
    OWN: tuple[type[Task], ...] = (Automata, Depo, Gsm, Program, Rule110, Track)
