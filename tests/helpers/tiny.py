"""Tiny models and batches for tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from powernap.model.batch import plan_segments
from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.mixers import MIXERS
from powernap.model.sleep import SleepOutput, sleep_and_predict
from powernap.model.stage import HybridStage
from powernap.train.config import Recipe

WINDOW = 6


def model_config(**changes) -> ModelConfig:
    """`changes`: fields, and sections with their changed fields."""
    sizes = dict(
        pattern="AGAG",
        window=WINDOW,
        vocab_size=17,
        pad_token_id=0,
        hidden_size=16,
        mlp=dict(ffn_hidden_size=24),
        attention=dict(heads=2),
        gdn=dict(heads=2, key_dim=4, value_dim=6, conv_kernel=3),
    )
    for mixer in MIXERS.values():  # any other's: required fields, and those that tensor ranks split
        fields = [name for name, field in mixer.model_fields.items() if field.is_required() or name == "groups"]
        sizes.setdefault(mixer.section, {name: 2 if name in ("heads", "groups") else 4 for name in fields})
    for name, value in changes.items():  # a section keeps the fields that are not named
        sizes[name] = {**sizes.get(name, {}), **value} if isinstance(value, dict) else value
    return ModelConfig(**sizes)


def build_stage(topology, model=None, sleep=None, dtype=torch.float64, seed=0) -> HybridStage:
    torch.manual_seed(seed)
    stage = HybridStage(model or model_config(), sleep or SleepConfig(), topology.groups)
    with torch.no_grad():  # norms and gates away from their initial values, so that a mistake in them shows
        for parameter in stage.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return stage.to(topology.device, dtype)


def batch(sequences=3, windows=3, predicting=(2,), seed=1, vocab_size=17) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens without pads and a loss mask over the targets of the windows in `predicting`: [B, windows * WINDOW + 1]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (sequences, windows * WINDOW + 1), generator=generator)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    for window in predicting:
        loss_mask[:, window * WINDOW + 2 : (window + 1) * WINDOW + 1] = True
    return tokens, loss_mask


ROWS = [
    [13, 5],
    [6, 12, 4],
    [25],
    [3, 8, 6],
]  # tokens of separate documents: four windows a row, some full, one with a single token


def separate_batch(seed=1, rows=ROWS, vocab_size=17) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of documents that know nothing of each other: tokens with pads (0), loss mask, document starts [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), 4 * WINDOW + 1)
    tokens = torch.zeros(shape, dtype=torch.int64)
    loss_mask, starts = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    for row, lengths in enumerate(rows):
        place = 0
        for length in lengths:
            tokens[row, place : place + length] = torch.randint(1, vocab_size, (length,), generator=generator)
            loss_mask[row, place + 1 : place + length] = True
            starts[row, place] = True
            place += -(-length // WINDOW) * WINDOW
    return tokens, loss_mask, starts


def alone(tokens, loss_mask, starts) -> tuple[torch.Tensor, torch.Tensor]:
    """The documents of `separate_batch`, each in a row of its own."""
    rows, masks = [], []
    for row, is_start in enumerate(starts):
        places = [*is_start.nonzero().flatten().tolist(), tokens.shape[1]]
        for place, behind in zip(places[:-1], places[1:], strict=True):
            rows.append(torch.zeros_like(tokens[row]))
            masks.append(torch.zeros_like(loss_mask[row]))
            rows[-1][: behind - place] = tokens[row, place:behind]
            masks[-1][: behind - place] = loss_mask[row, place:behind]
    return torch.stack(rows), torch.stack(masks)


PROBE = 3  # tokens: two of question, one of answer


def batch_with_probes(
    sequences=3, windows=3, seed=1, vocab_size=17
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """`batch` with a probe after every window and two after the last; the loss is on each one's last token."""
    probes = [(end - PROBE, end) for end in range(WINDOW + PROBE, windows * (WINDOW + PROBE) + 1, WINDOW + PROBE)]
    probes.append((probes[-1][1], probes[-1][1] + PROBE))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size, (sequences, probes[-1][1]), generator=generator)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, [stop - 1 for _, stop in probes]] = True
    return tokens, loss_mask, probes


def thin_out(loss_mask: torch.Tensor, seed: int) -> torch.Tensor:
    """About 60 % of the loss tokens, other positions and another number in every sequence; the last token stays one."""
    thinned = loss_mask & (torch.rand(loss_mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.6)
    thinned[:, -1] = True
    return thinned


def recipe(model, sleep, passes: int | list[int], sequence_length: int, seed=0, **sections: dict) -> Recipe:
    """A recipe around a model, for code that takes a whole recipe."""
    return Recipe(
        run={"name": "tiny", "seed": seed},
        model=model,
        sleep=sleep.model_copy(update={"passes": passes}),
        data={"train": "-", "sequence_length": sequence_length},
        **sections,
    )


def run(stage, tokens, loss_mask, passes=1, sleep=None, between_windows=None, probes=(), **options) -> SleepOutput:
    """`between_windows`: maps the layer states at every window's end."""
    segments = plan_segments(tokens, loss_mask, stage.model, sleep or SleepConfig(), passes, probes)
    device = stage.embedding.weight.device
    if between_windows:
        options["recompute"] = "none"  # by then the stage's forward is restored
    with crossing(stage, segments, between_windows):
        return sleep_and_predict(stage, segments, tokens.to(device), loss_mask.to(device), **options)


@contextmanager
def crossing(stage, segments, between_windows: Callable | None) -> Iterator[None]:
    """Inside, the first segment of every later window begins with what `between_windows` makes of the layer states."""
    firsts = {a.window: a for a in reversed(segments)}
    forward = stage.forward

    def with_other_states(segment, tokens, hidden_states, layer_states, document_starts, run_part):
        if segment.window and segment is firsts[segment.window]:
            layer_states = between_windows(layer_states)
        return forward(segment, tokens, hidden_states, layer_states, document_starts, run_part)

    if between_windows:
        stage.forward = with_other_states
    yield
    stage.forward = forward


def gradients(stage, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients by name; zero for an unused parameter."""
    named = dict(stage.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def assert_finite_differences_agree(stage, loss: Callable[[], torch.Tensor]) -> None:
    """The gradient of `loss` along a random direction of every parameter, against two evaluations beside it."""
    found = gradients(stage, loss())
    generator = torch.Generator().manual_seed(3)
    for name, parameter in stage.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device)
        sides = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter += step * direction
                sides.append(loss().item())
        with torch.no_grad():
            parameter += 1e-6 * direction
        expected = (sides[0] - sides[1]) / 2e-6
        assert (found[name] * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-7), name
