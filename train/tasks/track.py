"""Track: where does an element go under a product of permutations that were read window by window?

The word problem of a finite group, state tracking in its plainest form (arXiv 2404.08819): at N=1 a hybrid is a linear
recurrence over windows, which cannot compose permutations without end; with N >= 2 a later pass writes what an earlier one
has read from the fast weights.

    [pad ...] [move] g g [move] g g ...        | [where x] y [where x] y ...
    windows of L = moves + 1, the last ones used | one window of questions

Each g is a generator of the group, a permutation of `points` elements. [where x] asks where x is after all of them. The loss
is on the answers. Shorter words are padded on the left by whole windows, which leave the fast weights as they are.
With asked=each the questions follow every window, each as a probe: read, answered and forgotten.

A fifth of the ways in which a long word may begin is held out: no word of the training begins like one of the test.
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
BEGINNING = 6  # generators that decide whether a word is held out; shorter words are in training and test alike


class Track(Section):
    """Sizes of track."""

    depth_name: ClassVar[str] = "windows"

    group: Literal["s3", "a5"] = Field("s3", description="s3: permutations of 3 elements; a5: the even ones of 5")
    windows: int = Field(8, ge=1, description="most windows of a word")
    min_windows: int = Field(1, ge=1, description="fewest windows of a word; a length is drawn for each sample")
    moves: int = Field(1, ge=1, description="generators a window")
    questions: int = Field(1, ge=1, description="elements asked for, none twice")
    asked: Literal["end", "each"] = Field("end", description="end: after the last window; each: after every window")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.min_windows > self.windows:
            raise ValueError(f"min_windows={self.min_windows} must not exceed windows={self.windows}")
        if self.questions > self.points:
            raise ValueError(f"questions={self.questions} must not exceed the {self.points} elements of {self.group}")
        if self.asked == "end" and 2 * self.questions > self.window:
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
        return self.first_element + self.points

    @property
    def window(self) -> int:
        return self.moves + 1

    @property
    def context_length(self) -> int:
        return self.window if self.asked == "each" else self.windows * self.window

    @property
    def sequence_length(self) -> int:
        return (self.windows - 1) * self._stride + self.window + 2 * self.questions

    @property
    def _stride(self) -> int:
        """Tokens from one window's beginning to the next one's."""
        return self.window + 2 * self.questions * (self.asked == "each")

    def token_name(self, token: int) -> str:
        """A token as a person reads it: generators as letters, elements as numbers from 1."""
        if token == PAD:
            return "[pad]"
        if token == MOVE:
            return "[move]"
        if token < self.first_question:
            return chr(ord("a") + token - FIRST_GENERATOR)
        if token < self.first_element:
            return f"[where {token - self.first_question + 1}]"
        return str(token - self.first_element + 1)

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """A word that belongs to the test (`held_out`) or to the training, and questions about it."""
        word = self._draw_word(rng, held_out).reshape(-1, self.moves)
        pads = self.windows - len(word)
        tokens = np.full(self.sequence_length, PAD, dtype=np.int32)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        answers, places = [], np.arange(self.points)
        for windows, moves in enumerate(word, start=1):
            start = (pads + windows - 1) * self._stride
            stop = start + self.window
            tokens[start:stop] = [MOVE, *(FIRST_GENERATOR + moves)]
            places = self.after(moves, places)
            if windows == len(word) or self.asked == "each":
                for element in rng.permutation(self.points)[: self.questions]:
                    tokens[stop : stop + 2] = self.first_question + element, self.first_element + places[element]
                    loss_mask[stop + 1] = True
                    answers.append((stop + 1, stop + 2, windows))
                    stop += 2
        return Sample(tokens, loss_mask, np.array(answers, dtype=np.int32), self._probes())

    def surface_guesses(self, sample: Sample) -> dict[str, Candidates]:
        """Any element that no earlier answer has taken; where the last window alone takes the element asked for."""
        tokens = sample.tokens.tolist()
        untaken: Candidates = []
        last_window: Candidates = []
        free: set[int] = set()
        end = 0
        for start, stop, _ in sample.answers.tolist():
            if self.asked == "each" or not end:  # an answer that is forgotten takes nothing
                free = set(range(self.first_element, self.vocab_size))
            if start - 1 > end:  # the first question after a window
                end = start - 1
                moves = np.array(tokens[end - self.moves : end]) - FIRST_GENERATOR
                last = self.after(moves, np.arange(self.points))
            untaken.append([(token,) for token in sorted(free)])
            last_window.append([(self.first_element + int(last[tokens[start - 1] - self.first_question]),)])
            free -= {tokens[start]}
            end = stop
        return {"an element not taken": untaken, "the last window alone": last_window}

    def _probes(self) -> np.ndarray:
        """One for each question after each window, those of pads too: all samples have theirs at the same tokens."""
        if self.asked == "end":
            return np.zeros((0, 2), dtype=np.int32)
        windows, questions = np.arange(self.windows)[:, None], np.arange(self.questions)
        starts = (windows * self._stride + self.window + 2 * questions).ravel()
        return np.stack([starts, starts + 2], axis=1).astype(np.int32)

    # Token ids: pad, [move], the generators, [where x] for each element, the elements.

    @property
    def first_question(self) -> int:
        return FIRST_GENERATOR + len(GROUPS[self.group])

    @property
    def first_element(self) -> int:
        return self.first_question + self.points

    def _draw_word(self, rng: np.random.Generator, held_out: bool) -> np.ndarray:
        """The generators of a word, by number."""

        def draw() -> np.ndarray:
            return rng.integers(len(GROUPS[self.group]), size=windows * self.moves)

        windows = int(rng.integers(self.min_windows, self.windows + 1))
        if windows * self.moves < BEGINNING:
            return draw()
        return draw_problem(draw, lambda word: word[:BEGINNING].tolist(), held_out, f"track with moves={self.moves}")

    def after(self, moves: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Where each element at `places` is after the generators `moves`, the first of them first."""
        for generator in moves.tolist():
            places = np.array(GROUPS[self.group][generator])[places]
        return places
