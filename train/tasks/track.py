"""Track: where does an element go under a product of permutations that were read window by window?

The word problem of a finite group, state tracking in its plainest form (arXiv 2404.08819): at N=1 a hybrid is a linear
recurrence over windows, which cannot compose permutations without end; with N >= 2 a later pass writes what an earlier one
has read from the fast weights.

    [pad ...] [move] g g [move] g g ...        | [where x] y [where x] y ...
    windows of L = moves + 1, the last ones used | one window of questions

Each g is a generator of the group, a permutation of `points` elements. [where x] asks where x is after all of them. The loss
is on the answers. Shorter words are padded on the left by whole windows, which leave the fast weights as they are.
"""

from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.model.section import Section
from powernap.train.tasks.sample import PAD, Candidates, Sample, draw_problem

# Generators, each with its images of 0, 1, 2, ...: two of each group, which generate it.
GROUPS = {
    "s3": ((1, 2, 0), (1, 0, 2)),  # all 6 permutations of 3 elements: solvable
    "a5": ((1, 2, 3, 4, 0), (1, 2, 0, 3, 4)),  # the 60 even ones of 5 elements: not solvable, so NC1-complete
}
MOVE, FIRST_GENERATOR = 1, 2
ALL_TRAINED = 5  # generators: a word this short is in training and test alike, there being only 2^5 of the longest


class Track(Section):
    """Sizes of track."""

    depth_name: ClassVar[str] = "windows"

    group: Literal["s3", "a5"] = Field("s3", description="s3: permutations of 3 elements; a5: the even ones of 5")
    windows: int = Field(8, ge=1, description="most windows of a word")
    min_windows: int = Field(1, ge=1, description="fewest windows of a word; a length is drawn for each sample")
    moves: int = Field(1, ge=1, description="generators a window")
    questions: int = Field(1, ge=1, description="elements asked for, none twice")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.min_windows > self.windows:
            raise ValueError(f"min_windows={self.min_windows} must not exceed windows={self.windows}")
        if self.questions > self.points:
            raise ValueError(f"questions={self.questions} must not exceed the {self.points} elements of {self.group}")
        if 2 * self.questions > self.window:
            raise ValueError(
                f"questions={self.questions} take {2 * self.questions} tokens and must fit a window of {self.window}: "
                f"write questions={self.window // 2}, or moves={2 * self.questions - 1}"
            )
        return self

    @property
    def points(self) -> int:
        return len(GROUPS[self.group][0])

    @property
    def vocab_size(self) -> int:
        return self._first_element + self.points

    @property
    def window(self) -> int:
        return self.moves + 1

    @property
    def context_length(self) -> int:
        return self.windows * self.window

    @property
    def sequence_length(self) -> int:
        return self.context_length + 2 * self.questions

    def token_name(self, token: int) -> str:
        """A token as a person reads it: generators as letters, elements as numbers from 1."""
        if token == PAD:
            return "[pad]"
        if token == MOVE:
            return "[move]"
        if token < self._first_question:
            return chr(ord("a") + token - FIRST_GENERATOR)
        if token < self._first_element:
            return f"[where {token - self._first_question + 1}]"
        return str(token - self._first_element + 1)

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """A word that belongs to the test (`held_out`) or to the training, and questions about it."""
        word = self._draw_word(rng, held_out)
        windows = word.reshape(-1, self.moves)
        context = np.concatenate([np.full((len(windows), 1), MOVE), FIRST_GENERATOR + windows], axis=1).ravel()
        asked = rng.permutation(self.points)[: self.questions]
        questions = np.stack([self._first_question + asked, self._first_element + self._after(word)[asked]], axis=1)

        tokens = np.full(self.sequence_length, PAD, dtype=np.int32)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        tokens[self.context_length - len(context) : self.context_length] = context
        tokens[self.context_length :] = questions.ravel()
        starts = self.context_length + 1 + 2 * np.arange(self.questions)
        loss_mask[starts] = True
        answers = np.stack([starts, starts + 1, np.full(self.questions, len(windows))], axis=1)
        return Sample(tokens, loss_mask, answers.astype(np.int32))

    def surface_guesses(self, sample: Sample) -> dict[str, Candidates]:
        """Any element that no earlier answer has taken; where the last window alone takes the element asked for."""
        tokens = sample.tokens
        last = self._after(tokens[self.context_length - self.moves : self.context_length] - FIRST_GENERATOR)
        free = set(range(self._first_element, self.vocab_size))
        untaken: Candidates = []
        last_window: Candidates = []
        for start, _, _ in sample.answers.tolist():
            untaken.append([(token,) for token in sorted(free)])
            last_window.append([(self._first_element + int(last[tokens[start - 1] - self._first_question]),)])
            free -= {int(tokens[start])}
        return {"an element not taken": untaken, "the last window alone": last_window}

    # Token ids: pad, [move], the generators, [where x] for each element, the elements.

    @property
    def _first_question(self) -> int:
        return FIRST_GENERATOR + len(GROUPS[self.group])

    @property
    def _first_element(self) -> int:
        return self._first_question + self.points

    def _draw_word(self, rng: np.random.Generator, held_out: bool) -> np.ndarray:
        """Generators by number; of words longer than ALL_TRAINED, a fifth is never trained on."""

        def draw() -> np.ndarray:
            return rng.integers(len(GROUPS[self.group]), size=windows * self.moves)

        windows = int(rng.integers(self.min_windows, self.windows + 1))
        if windows * self.moves <= ALL_TRAINED:
            return draw()
        return draw_problem(draw, lambda word: word.tolist(), held_out, f"track with moves={self.moves}")

    def _after(self, word: np.ndarray) -> np.ndarray:
        """Where each element is after the generators of `word`, the first of them first."""
        places = np.arange(self.points)
        for generator in word.tolist():
            places = np.array(GROUPS[self.group][generator])[places]
        return places
