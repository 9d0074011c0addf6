"""The confidence interval of an accuracy when several questions are asked about one sequence.

Such answers are not independent: a model that misread a context fails most of its questions. Sequences are independent,
so standard errors are clustered by sequence (arXiv 2411.00640), and enter Wilson's interval as an effective number of
answers (Wilson 1927; Dean and Pagano 2015 find it keeps its coverage for shares near 0 and 1).
"""

import math
from dataclasses import dataclass
from typing import Self

NORMAL_95 = 1.959964  # quantile of the normal distribution at 97.5 %


@dataclass(frozen=True)
class Tally:
    """Sums over the sequences with answers of one depth; `asked` and `right` count a sequence's answers."""

    sequences: int
    asked: int
    right: int
    asked_squared: int
    right_squared: int
    right_times_asked: int
    with_right: int  # sequences with a right answer
    with_wrong: int  # sequences with a wrong one

    @classmethod
    def of_sequence(cls, right: int, asked: int) -> Self:
        return cls(1, asked, right, asked**2, right**2, right * asked, int(right > 0), int(right < asked))

    @property
    def share(self) -> float:
        return self.right / self.asked

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the share of right answers."""
        return wilson(self.share, self.effective_answers())

    def effective_answers(self) -> float:
        """The number of independent answers with the same information: `asked` over the design effect.

        The design effect is the variance over that of independent answers. It is largest if a sequence's answers are
        all right or all wrong together. Near 0 and 1 few sequences show the correlation, and the effect is often
        underestimated: so one more sequence with the largest effect is counted among them. (Without it 90 of 100
        intervals contain the truth there; tests/train/evaluation/test_intervals.py.)
        """
        largest = self.asked_squared / self.asked
        shown = min(self.with_right, self.with_wrong)
        if not shown or self.sequences == 1:
            return self.asked / largest
        share = self.share
        residuals = self.right_squared - 2 * share * self.right_times_asked + share**2 * self.asked_squared
        estimate = residuals * self.sequences / (self.sequences - 1) / (self.asked * share * (1 - share))
        effect = (shown * estimate + largest) / (shown + 1)
        return self.asked / min(max(effect, 1.0), largest)


def wilson(share: float, answers: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share among independent answers."""
    z2 = NORMAL_95**2
    middle = (share + z2 / (2 * answers)) / (1 + z2 / answers)
    half_width = NORMAL_95 / (1 + z2 / answers) * math.sqrt(share * (1 - share) / answers + z2 / (4 * answers**2))
    return max(0.0, min(share, middle - half_width)), min(1.0, max(share, middle + half_width))
