"""A loss term, and distillation, have the gradient of their formula in every layout; one that is no number for each token is refused."""

import pytest
import torch

from powernap.model.loss_terms import LossTerm, LossTermError, Rows
from tests.helpers import loss_terms
from tests.helpers.cases import asked_for, names
from tests.helpers.loss_terms import Case
from tests.helpers.processes import run_cases

CASES = {
    "one": Case(),
    "one, in chunks, computed again": Case(recompute="segment", head_numbers=60),
    "text": Case(predicting=(0, 1, 2), sleep={"every_window": True}, recompute="blocks"),
    "TP2, in chunks": Case(tensor=2, head_numbers=60),
    "TP2+SP, vocabulary padded": Case(tensor=2, sequence=True, recompute="segment", vocab_size=19),
    "PP2": Case(pipeline=2),
    "DP2": Case(data=2, recompute="nested"),
    "TP2xPP2": Case(tensor=2, pipeline=2, recompute="segment"),
    "distillation": Case(context="window"),
    "distillation of the sequence, in chunks": Case(context="sequence", recompute="segment", head_numbers=60),
    "distillation of text": Case(context="window", predicting=(0, 1, 2), sleep={"every_window": True}),
    "distillation, TP2, in chunks, vocabulary padded": Case(context="window", tensor=2, head_numbers=60, vocab_size=19),
    "distillation of the sequence, TP2+SP": Case(context="sequence", tensor=2, sequence=True, recompute="blocks"),
    "distillation, PP2": Case(context="window", pipeline=2, recompute="segment"),
    "distillation of the sequence, PP2": Case(context="sequence", pipeline=2),
    "distillation, DP2": Case(context="window", data=2),
    "distillation, TP2xPP2+SP": Case(context="window", tensor=2, pipeline=2, sequence=True),
}
BROKEN = {
    "no gradient through the gather": Case(tensor=2, broken="gradient through the gather"),
    "no weight": Case(broken="weight"),
    "softmax of one rank's vocabulary": Case(context="window", tensor=2, broken="sum over tensor ranks"),
    "taught of another token": Case(context="window", broken="token"),
    "taught of another token, PP2": Case(context="window", pipeline=2, broken="token"),
    "taught of another window": Case(context="window", broken="window"),
}


# One of each kind, for `make test`.
FAST = [
    "one, in chunks, computed again",
    "TP2+SP, vocabulary padded",
    "PP2",
    "distillation of text",
    "distillation, TP2, in chunks, vocabulary padded",
    "distillation of the sequence, PP2",
    "distillation, DP2",
]
FAST_BROKEN = ["no gradient through the gather", "softmax of one rank's vocabulary", "taught of another token, PP2"]


@pytest.fixture(scope="module")
def results(request):
    return run_cases(loss_terms.compare, asked_for(request, CASES | BROKEN))


@pytest.mark.parametrize("name", names(FAST, CASES))
def test_its_gradient_is_that_of_the_formula(results, name):
    bound = 1e-6 if CASES[name].tensor > 1 else 1e-10  # Megatron-core's cross-entropy is float32
    for result in results[name]:
        assert max(result.values()) < bound, result


@pytest.mark.parametrize("name", names(FAST_BROKEN, BROKEN))
def test_the_comparison_sees_what_is_broken(results, name):
    assert max(result["gradient"] for result in results[name]) > 1e-2


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda logits, targets: logits.mean(), r"returned \[\] for 3 tokens: return a number for each, \[3\]"),
        (lambda logits, targets: 1.0, "returned float for 3 tokens"),
    ],
)
def test_what_is_no_number_for_each_token_is_refused(topology, function, words):
    rows = Rows(torch.ones(3, 5), torch.zeros(3, dtype=torch.long), None, topology.groups.tp, 5)
    with pytest.raises(LossTermError, match=f"loss term odd {words}"):
        LossTerm("odd", function).values(rows)
