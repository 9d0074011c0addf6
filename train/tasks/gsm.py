"""Word problems with a chosen number of operations, hidden among distractors (after GSM-Infinite, arXiv 2502.05252).

A problem is a graph of quantities such as "apples in the barn". A sentence tells a number, or one operation on one or
two other quantities. No sentence tells the total of a place's kinds, or of the parts that each of them has on average.
The question names a quantity that takes exactly `ops` operations. It comes first, so that a reader could know what
matters, but the facts it needs are spread over the context in random order. No steps of a solution are given. The
distractors are problems like the one that is asked.

    question sentence sentence ... [pad ...]         | [answer] digit ... [end] [pad ...]
    context_length tokens, whole windows             | one window, loss on digits and [end]

Text is split into words and digits, one token each.
"""

import re
from collections import Counter
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.model.section import Section
from powernap.train.tasks.gsm_problem import Exhausted, Problem, Problems, operations, pick, solve
from powernap.train.tasks.gsm_words import (
    ANSWER,
    END,
    QUESTION,
    QUESTIONS,
    SETTINGS,
    TYPICAL,
    VOCABULARY,
    fitting,
    ids,
    say,
)
from powernap.train.tasks.sample import PAD, Candidates, Sample, TaskError, draw_problem

TRIES = 100
NAMES_SUFFICE_FOR = 15_000  # tokens; a longer context may end with pads
_THING = re.compile(r"(?:\S+ per )?\S+ in the \S+")


class Gsm(Section):
    """Sizes of the word problems; the defaults are near the paper's GSM-Infinite."""

    ops: int = Field(8, ge=1, description="most operations an answer takes")
    min_ops: int = Field(1, ge=1, description="fewest operations an answer takes")
    context_length: int = Field(
        2000, ge=20, description="tokens of question and sentences, filled with distractors up to 15,000"
    )
    window: int = Field(2000, ge=1, description="L; divides context_length")
    max_value: int = Field(99, ge=9, le=9999, description="no quantity is larger")
    difficulty: Literal["easy", "medium", "hard"] = Field(
        "hard",
        description="easy: sums and differences that sentences tell; medium: and totals that follow from names; hard: "
        "and multiples, averages, totals of parts",
    )
    mode: Literal["forward", "reverse", "both"] = Field(
        "both",
        description="forward: from numbers to what is asked; reverse: the last quantity is given, a number asked for",
    )
    depth: Literal["ops", "chain"] = Field(
        "ops", description="what an answer's depth counts: operations, or quantities derived one from the other"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.min_ops > self.ops:
            raise ValueError(f"min_ops={self.min_ops} must not exceed ops={self.ops}")
        if self.context_length % self.window:
            raise ValueError(
                f"window={self.window} must divide context_length={self.context_length}: "
                f"context_length={-(-self.context_length // self.window) * self.window} would do"
            )
        if self._answer_length > self.window:
            raise ValueError(f"window={self.window} must hold the {self._answer_length} tokens of an answer")
        if self._room_for(self.ops) > self.context_length:
            needed = self._room_for(self.ops)
            raise ValueError(f"ops={self.ops} may take {needed} tokens: write context_length={needed} or more")
        return self

    @property
    def depth_name(self) -> str:
        return {"ops": "operations", "chain": "steps"}[self.depth]

    @property
    def vocab_size(self) -> int:
        return len(VOCABULARY)

    @property
    def sequence_length(self) -> int:
        return self.context_length + self._answer_length

    @property
    def _answer_length(self) -> int:
        """[answer], the digits, [end]."""
        return len(str(self.max_value)) + 2

    def token_name(self, token: int) -> str:
        """A token's name for display."""
        return VOCABULARY[token]

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """Draw a problem, held out or not, and a text that it hides in. `depth` does not change which."""
        ops = int(rng.integers(self.min_ops, self.ops + 1))
        for _ in range(TRIES):
            drawn = self._draw(ops, rng, held_out)
            if drawn is not None:
                break
        else:
            raise TaskError(
                f"gsm: no problem of {ops} operations in {self.context_length} tokens: choose a larger context_length"
            )
        words, answer, chain = drawn
        tokens = np.full(self.sequence_length, PAD, dtype=np.int32)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        tokens[: len(words)] = ids(words)
        reply = ids([ANSWER, *str(answer), END])
        start, stop = self.context_length + 1, self.context_length + len(reply)
        tokens[start - 1 : stop] = reply
        loss_mask[start:stop] = True
        depth = ops if self.depth == "ops" else chain
        return Sample(tokens, loss_mask, np.array([(start, stop, depth)], dtype=np.int32))

    def surface_guesses(self, sample: Sample) -> dict[str, Candidates]:
        """A number from the text: the first, last, commonest, largest, or one beside a quantity that stands out."""
        words = [VOCABULARY[token] for token in sample.tokens[: self.context_length] if token != PAD]
        question, *told = " ".join(words).replace("?", ".").split(" . ")
        asked = _THING.search(question)
        numbers = _numbers(" ".join(told))
        if not numbers or not asked:
            return {}
        mentions = Counter(thing for sentence in told for thing in _THING.findall(sentence))
        most_mentioned = mentions.most_common(1)[0][0]
        guesses = {
            "first number": numbers[0],
            "last number": numbers[-1],
            "commonest number": Counter(numbers).most_common(1)[0][0],
            "largest number": max(numbers, key=int),
            "number beside the asked": _beside(asked[0], told) or numbers[0],
            "number beside the most mentioned": _beside(most_mentioned, told) or numbers[0],
        }
        return {name: [[tuple(ids([*number, END]))]] * len(sample.answers) for name, number in guesses.items()}

    def _room_for(self, ops: int) -> int:
        """Tokens that nearly every problem of `ops` operations and its question fit into."""
        return TYPICAL * (2 * ops + 2)

    def _draw(self, ops: int, rng: np.random.Generator, held_out: bool) -> tuple[list[str], int, int] | None:
        """Question and sentences as words, the answer, and the longest chain to it; None if they do not fit.

        The problem that is asked is added at a random time: it shares its numbers with as many others as they do.
        """
        text = Problems(
            pick(rng, SETTINGS),
            totals=self.difficulty != "easy",
            products=self.difficulty == "hard",
            most=self.max_value,
            random=rng,
        )
        room = self.context_length - QUESTION
        reserved = min(room, self._room_for(ops))
        before = rng.random() * min(room - reserved, NAMES_SUFFICE_FOR)
        while room > reserved + before and (other := self._distractor(text, room - reserved, rng)):
            room -= other.length
        try:
            problem = draw_problem(
                lambda: text.draw(ops, self._is_backward(rng)), Problem.canonical, held_out, f"gsm with ops={ops}"
            )
        except Exhausted:
            return None
        text.add(problem)
        room -= problem.length
        while other := self._distractor(text, room, rng):
            room -= other.length
        if room < 0:
            return None
        found = solve(text.relations)
        asked = found[problem.asked]
        assert operations(found, problem.asked) == ops and 0 <= asked.value <= self.max_value
        words = say(pick(rng, fitting(QUESTIONS, (problem.asked,))), (problem.asked,))
        for place in rng.permutation(len(text.relations)):
            words += text.relations[place].words
        return words, asked.value, asked.chain

    def _distractor(self, text: Problems, room: int, rng: np.random.Generator) -> Problem | None:
        """Add a problem like the one that is asked, or a smaller one if that does not fit; None if none does."""
        ops = int(rng.integers(self.min_ops, self.ops + 1))
        while ops:
            try:
                problem = text.draw(ops, self._is_backward(rng))
            except Exhausted:
                return None
            if problem.length <= room:
                text.add(problem)
                return problem
            ops //= 2
        return None

    def _is_backward(self, rng: np.random.Generator) -> bool:
        return self.mode == "reverse" or (self.mode == "both" and rng.random() < 0.5)


def _beside(thing: str, sentences: list[str]) -> str | None:
    """The first number in a sentence that names a thing."""
    return next((number for sentence in sentences if thing in sentence for number in _numbers(sentence)), None)


def _numbers(text: str) -> list[str]:
    """Every number in a text with blanks between its digits."""
    return [number.replace(" ", "") for number in re.findall(r"\b\d(?: \d)*\b", text)]
