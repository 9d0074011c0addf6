"""Depo: follow k edges of a directed cycle that was read in random order (from "Physics of Language Models 4.1").

names=words is the format of arXiv 2605.26099. A node's name is a word of one or two tokens, the last of them marked.

    [pad ...] source destination  source destination ...  | [hop k] word [ans] word  [hop k] word ... [pad ...]
    4 * nodes tokens, four windows of L = nodes           | 6 * queries tokens

names=ends is a small variant for demonstrations: a node has one token as the source of an edge and another as the
destination, so that a single attention layer can tell the ends of an edge apart.

    [pad ...] source destination  source destination ...  | [hop k] source source  [hop k] source source ...
    one window of L >= 2 * nodes tokens, a multiple of 3  | 3 * queries tokens: no question straddles two windows

With `delay` as many pads lie between the two: the cycle is evicted before the first question, whatever the window's length.

No question is asked twice in a sequence: up to n `queries`, all starts differ, as in PhysicsLM4's generator; beyond
that, a start returns with another hop. The loss is on the answers only.
"""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from powernap.model.section import Section
from powernap.train.tasks.sample import PAD, Candidates, Sample, TaskError, draw_problem

Word = tuple[int, ...]  # the tokens of a name


class Depo(Section):
    """Sizes of Depo; the defaults are the paper's."""

    depth_name: ClassVar[str] = "hops"

    nodes: int = Field(75, ge=3, description="most nodes of a cycle")
    min_nodes: int | None = Field(None, ge=3, description="fewest nodes of a cycle; null: always `nodes`")
    max_hop: int = Field(16, ge=1, description="k is drawn from 1 .. max_hop")
    queries: int = Field(10, ge=1, description="questions per cycle, no (start, hop) twice")
    lengths: Literal["uniform", "short"] = Field(
        "uniform",
        description="nodes n of a training cycle. uniform: from min_nodes to `nodes`; short: PhysicsLM4's, p ~ 1/(n + "
        "sqrt(nodes)) from min_nodes (3) to `nodes`, hops go round the cycle, and a test cycle always has `nodes`",
    )
    names: Literal["words", "ends"] = Field("words", description="words: 1-2 tokens a node; ends: one token an end")
    delay: int = Field(0, ge=0, multiple_of=3, description="names=ends: pads between the cycle and the questions")
    alphabet: int = Field(50, ge=1, description="plain tokens that words are made of, and as many marked ones")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.fewest_nodes > self.nodes:
            raise ValueError(f"min_nodes={self.min_nodes} must not exceed nodes={self.nodes}")
        if self.lengths == "uniform" and self.max_hop >= self.fewest_nodes:
            field = "nodes" if self.min_nodes is None else "min_nodes"
            raise ValueError(
                f"max_hop={self.max_hop} must be below {field}={self.fewest_nodes}, or it goes round the whole cycle"
            )
        if self.names == "words":
            if self.delay:
                raise ValueError(f"delay={self.delay} is for names=ends")
            words = self.alphabet + self.alphabet**2
            if self.nodes > words:
                raise ValueError(f"nodes={self.nodes} must not exceed the {words} words of alphabet={self.alphabet}")
            if 6 * self.queries > self.nodes:
                raise ValueError(
                    f"queries={self.queries} take {6 * self.queries} tokens and must fit a window, nodes={self.nodes}: "
                    + (f"use queries={self.nodes // 6}" if self.nodes >= 6 else "use nodes=6 or more")
                )
        return self

    @property
    def fewest_nodes(self) -> int:
        return self.min_nodes or (self.nodes if self.lengths == "uniform" else 3)

    @property
    def vocab_size(self) -> int:
        return self._first_hop + self.max_hop + (1 if self.names == "words" else 0)

    @property
    def window(self) -> int:
        return self.nodes if self.names == "words" else -(-2 * self.nodes // 3) * 3

    @property
    def context_length(self) -> int:
        return 4 * self.nodes if self.names == "words" else self.window + self.delay

    @property
    def sequence_length(self) -> int:
        return self.context_length + self.queries * (6 if self.names == "words" else 3)

    def token_name(self, token: int) -> str:
        """A token's name for display: names as numbers, the last token of a word and a destination with a dot."""
        first = self.alphabet if self.names == "words" else self.nodes
        if token == PAD:
            return "[pad]"
        if token < self._first_hop:
            return str(token) if token <= first else f"{token - first}."
        hop = token - self._first_hop + 1
        return f"[hop {hop}]" if hop <= self.max_hop else "[ans]"

    def sample(self, rng: np.random.Generator, held_out: bool) -> Sample:
        """Draw a cycle, held out or not, with random questions.

        Raises:
            TaskError: if there are fewer different questions than `queries`. The fields do not check this: older shards
                that repeat questions must still load with them.
        """
        questions = self.fewest_nodes * self.max_hop
        if self.queries > questions:
            raise TaskError(
                f"queries={self.queries} exceed the {questions} different questions of {self.fewest_nodes} nodes with "
                f"max_hop={self.max_hop}: write queries={questions} or fewer"
            )
        cycle = draw_problem(
            lambda: self._draw_cycle(rng, held_out), _canonical, held_out, f"depo with nodes={self.nodes}"
        )
        n = len(cycle)
        tokens = np.full(self.sequence_length, PAD, dtype=np.int32)
        loss_mask = np.zeros(self.sequence_length, dtype=bool)
        answers = []

        edges = [(cycle[i], cycle[(i + 1) % n]) for i in rng.permutation(n)]
        context = [token for source, destination in edges for token in (*source, *self._as_destination(destination))]
        end = self.context_length - self.delay
        tokens[end - len(context) : end] = context

        position = self.context_length
        for start, hop in self._draw_questions(n, rng):
            answer = cycle[(start + hop) % n]
            question = (self._first_hop + hop - 1, *cycle[start], *self._answer_mark)
            first, stop = position + len(question), position + len(question) + len(answer)
            tokens[position:stop] = (*question, *answer)
            loss_mask[first:stop] = True
            answers.append((first, stop, hop))
            position = stop
        return Sample(tokens, loss_mask, np.array(answers, dtype=np.int32))

    def surface_guesses(self, sample: Sample) -> dict[str, Candidates]:
        """Any node that no single earlier question rules out; if one gives the answer away, that node.

        A question with its answer tells how far apart two nodes are. This rules out the one at every other distance
        from the other, and all other nodes at that distance. What follows only from several questions together is not
        used.
        """
        tokens = sample.tokens.tolist()
        nodes = set(self._names(tokens[: self.context_length]))
        known: list[tuple[Word, Word, int]] = []  # from, to, edges between them
        guesses = []
        for start, stop, hop in sample.answers.tolist():
            asked, answer = self._asked(tokens, start), tuple(tokens[start:stop])
            distance = hop % len(nodes)
            out, given = set() if distance == 0 else {asked}, {asked} if distance == 0 else set()
            for one, other, apart in known:
                if one == asked:
                    (given if apart == distance else out).add(other)
                elif apart == distance:
                    out.add(other)
            guesses.append(sorted(given or nodes - out))
            known += [(asked, answer, distance), (answer, asked, -hop % len(nodes))]
        return {"a node not ruled out": guesses}

    def _names(self, context: list[int]) -> Iterator[Word]:
        """The name of each node in the edges, written as a source."""
        if self.names == "ends":
            yield from ((token,) for token in context if PAD < token <= self.nodes)
            return
        word: list[int] = []
        for token in context:
            if token != PAD:
                word.append(token)
            if token > self.alphabet:  # marked: the last of a word
                yield tuple(word)
                word = []

    def _asked(self, tokens: list[int], answer: int) -> Word:
        """The start node of the question whose answer begins at `answer`."""
        stop = answer - len(self._answer_mark)
        start = stop - 1
        while tokens[start - 1] < self._first_hop:
            start -= 1
        return tuple(tokens[start:stop])

    # Token ids: pad, then
    #   words: 1 .. alphabet plain, as many marked, the hops, [ans]
    #   ends: 1 .. nodes sources, as many destinations, the hops

    @property
    def _first_hop(self) -> int:
        return 1 + 2 * (self.alphabet if self.names == "words" else self.nodes)

    @property
    def _answer_mark(self) -> Word:
        return (self._first_hop + self.max_hop,) if self.names == "words" else ()

    def _as_destination(self, name: Word) -> Word:
        return name if self.names == "words" else (name[0] + self.nodes,)

    def _draw_cycle(self, rng: np.random.Generator, held_out: bool) -> list[Word]:
        """Names in the order of the cycle, as sources."""
        n = self._draw_length(rng, held_out)
        if self.names == "words":
            return self._draw_words(n, rng)
        return [(int(node),) for node in 1 + rng.permutation(self.nodes)[:n]]

    def _draw_length(self, rng: np.random.Generator, held_out: bool) -> int:
        if self.lengths == "uniform":
            return int(rng.integers(self.fewest_nodes, self.nodes + 1))
        if held_out:
            return self.nodes
        lengths = np.arange(self.fewest_nodes, self.nodes + 1)
        weights = 1 / (lengths + self.nodes**0.5)
        return int(rng.choice(lengths, p=weights / weights.sum()))

    def _draw_questions(self, n: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """(index of the start in the cycle, hop), none twice; a start returns when all have been asked as often."""
        rounds = -(-self.queries // n)
        starts = np.concatenate([rng.permutation(n) for _ in range(rounds)])[: self.queries]
        hops = 1 + np.stack([rng.permutation(self.max_hop)[:rounds] for _ in range(n)])  # of each start, by round
        return [(start, int(hops[start, i // n])) for i, start in enumerate(starts.tolist())]

    def _draw_words(self, n: int, rng: np.random.Generator) -> list[Word]:
        """n distinct words in random order; lengths 1 and 2 are equally likely before repeats are thrown away."""
        words: dict[Word, None] = {}  # a set that keeps its order
        while len(words) < n:
            count = n - len(words)
            lengths = rng.integers(1, 3, size=count).tolist()
            plain, marked = rng.integers(1, self.alphabet + 1, size=(2, count)).tolist()
            for length, first, last in zip(lengths, plain, marked, strict=True):
                words[(last + self.alphabet,) if length == 1 else (first, last + self.alphabet)] = None
        return list(words)


def _canonical(cycle: list[Word]) -> list[int]:
    """The tokens of a cycle rotated to start with its smallest name: the same for every starting point."""
    smallest = cycle.index(min(cycle))
    return [token for name in cycle[smallest:] + cycle[:smallest] for token in name]
