"""Accuracy by depth: how many hops, steps or operations a model can compute in its sleep, for several N."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from powernap.model.batch import pad_end, plan_segments
from powernap.model.fast_weights import LayerStates
from powernap.model.segments import windows_of
from powernap.model.stage import HybridStage
from powernap.parallel.schedule import MicroBatch, predict
from powernap.parallel.topology import Topology, distributed_session
from powernap.train.config import DataConfig, Recipe
from powernap.train.data.loader import Batch, evaluation_batches
from powernap.train.data.manifest import read_manifest
from powernap.train.data.shard_list import expand_shards, local_path
from powernap.train.data.test_sets import named_tests, stored_length, test_sets, test_tokens_per_byte
from powernap.train.data.vocabulary import depth_name_of
from powernap.train.evaluation.floors import Floor, best_guesses
from powernap.train.evaluation.intervals import Tally
from powernap.train.evaluation.pictures import draw_accuracy, draw_loss
from powernap.train.evaluation.places import PLACES, place_name, places_of, sum_by_place
from powernap.train.evaluation.tables import FLOOR_LABEL, format_accuracy, format_rows, some_depths, with_intervals
from powernap.train.outputs import check_folder
from powernap.train.recipe_file import RecipeError
from powernap.train.run.folder import RunFolder
from powernap.train.run.secrets import MASK, mask_secrets, mask_values
from powernap.train.tracking.tracked import main_results
from powernap.train.tracking.trackers import Trackers


@dataclass(frozen=True)
class Evaluation:
    """A model's results on held-out data. An answer is right if all its tokens are."""

    loss: dict[str, float]  # N -> mean over the loss tokens
    accuracy: dict[str, dict[str, float]]  # N -> depth -> share of right answers
    interval: dict[str, dict[str, tuple[float, float]]]  # N -> depth -> 95 % interval, see intervals.py
    floor: dict[str, float]  # depth -> share that the best surface guess gets, see floors.py; empty if not asked for
    guesses: dict[str, dict[str, float]]  # surface guess -> depth -> share that it gets
    answers: dict[str, int]  # depth -> answers
    sequences: dict[str, int]  # depth -> sequences that hold them
    windows: int  # of a sequence, probes apart
    # Of data without answers: N -> windows of the document, from 1, such as 5-8 -> mean over the loss tokens there.
    loss_by_window: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens_by_window: dict[str, int] = field(default_factory=dict)  # loss tokens
    # Other lengths than the training's, by windows; where two have as many, by tokens, too.
    lengths: "dict[str, Evaluation]" = field(default_factory=dict)
    bits_per_byte: dict[str, float] = field(default_factory=dict)  # N -> of text whose manifest counts its bytes
    name: str = ""  # of the test set, if there are several, and
    others: "dict[str, Evaluation]" = field(default_factory=dict)  # the sets after the first

    def metrics(self, of_length: str = "") -> dict[str, float]:
        """Loss and accuracy under their names in metrics.jsonl and MLflow."""
        of_length = f"/{self.name}{of_length}" if self.name else of_length
        found = {f"held_out_loss/N{passes}{of_length}": value for passes, value in self.loss.items()}
        found |= {f"bits_per_byte/N{passes}{of_length}": value for passes, value in self.bits_per_byte.items()}
        for passes, by_window in self.loss_by_window.items():
            found |= {f"held_out_loss/N{passes}{of_length}/window_{which}": loss for which, loss in by_window.items()}
        for passes, by_depth in self.accuracy.items():
            found |= {f"accuracy/N{passes}{of_length}/depth_{depth}": value for depth, value in by_depth.items()}
        for windows, other in self.lengths.items():
            found |= other.metrics(f"{of_length}/windows_{windows}")
        for other in self.others.values():
            found |= other.metrics()
        return found


@torch.no_grad()
def evaluate(
    stage: HybridStage, recipe: Recipe, passes: list[int], samples: int, topology: Topology, *, floors: bool = True
) -> Evaluation:
    """Evaluate the first `samples` test samples of each length with each N in `passes`, split over the data-parallel ranks.

    floors: count surface guesses too; takes a few milliseconds per sample and gives the same result after every step.

    An answer is right if each of its tokens is the likeliest one given the true tokens before it, which holds exactly
    when greedy decoding would produce it.
    """
    own, *others = [
        replace(_evaluate_set(stage, recipe, data, passes, samples, topology, floors), name=name)
        for name, data in named_tests(recipe.data).items()
    ]
    return replace(own, others={other.name: other for other in others})


def _evaluate_set(
    stage: HybridStage,
    recipe: Recipe,
    data: DataConfig,
    passes: list[int],
    samples: int,
    topology: Topology,
    floors: bool,
) -> Evaluation:
    """`evaluate` for one test set."""
    found: dict[str, Evaluation] = {}
    for of_one in test_sets(data):
        of_length = _evaluate(stage, recipe.model_copy(update={"data": of_one}), passes, samples, topology, floors)
        name = str(of_length.windows)
        found[name if name not in found else f"{name}_of_{of_one.sequence_length}_tokens"] = of_length
    own, *others = found
    return replace(found[own], lengths={name: found[name] for name in others})


def _evaluate(
    stage: HybridStage, recipe: Recipe, passes: list[int], samples: int, topology: Topology, floors: bool
) -> Evaluation:
    """`evaluate` for sequences of one length."""
    floor = Floor.of_test(recipe.data) if floors else None
    windows = 0
    asked: Counter[int] = Counter()  # depth -> answers
    by_sequence: Counter[tuple[int, int, str]] = Counter()  # (N, depth, field of Tally)
    part = 0  # of each row's document
    # Loss tokens, and for each N the sum of their losses, by their place in the document.
    losses = torch.zeros(1 + len(passes), PLACES, dtype=torch.float64, device=topology.device)
    carried: dict[int, LayerStates | None] = {}  # N -> layer states after the previous batch, under sleep.carry
    batches = evaluation_batches(
        recipe.data,
        batch_size=recipe.micro_batch_size,
        vocab_size=recipe.model.vocab_size,
        pad_token_id=recipe.model.pad_token_id,
        rank=topology.dp_rank,
        world_size=topology.dp_size,
        limit=samples,
    )
    for batch in batches:
        inputs = batch.tokens.shape[1] - 1
        read = [w.tokens for w in windows_of(inputs, recipe.model, recipe.sleep, batch.probes) if not w.probe]
        windows = len(read)
        part = 0 if batch.is_document_start.all() else part + 1
        places = places_of(batch.tokens.shape[1], read, part).to(topology.device)
        asked.update(depth for _, depth, _ in _answers(batch))
        if floor:
            floor.add_all(batch.tokens.numpy(), batch.answers, batch.probes)
        losses[0] += batch.is_real * sum_by_place(batch.loss_mask.to(topology.device), places)
        for i, n in enumerate(passes, start=1):
            before = carried[n] if part else None
            predictions, token_losses, after = _predict(stage, recipe, batch, n, topology, before)
            carried[n] = after if recipe.sleep.carry else None
            losses[i] += batch.is_real * sum_by_place(token_losses, places)
            by_sequence.update(_tally(batch, predictions, n))
    loss_tokens, *sums = topology.all_reduce_over_data(losses).cpu()
    answers, by_sequence = (
        topology.all_reduce_counter_over_data(asked),
        topology.all_reduce_counter_over_data(by_sequence),
    )
    depths = sorted(answers)
    found_at = {} if answers else {place_name(place): place for place in loss_tokens.nonzero().flatten().tolist()}
    guesses = floor.shares(topology.all_reduce_counter_over_data(floor.counts)) if floor else {}
    tallies = {
        n: {d: Tally(**{field.name: by_sequence[n, d, field.name] for field in fields(Tally)}) for d in depths}
        for n in passes
    }
    loss = {str(n): float(of_n.sum() / loss_tokens.sum()) for n, of_n in zip(passes, sums, strict=True)}
    tokens_per_byte = test_tokens_per_byte(recipe.data)
    return Evaluation(
        loss=loss,
        bits_per_byte={n: value / math.log(2) * tokens_per_byte for n, value in loss.items() if tokens_per_byte},
        accuracy={str(n): {str(depth): tally.share for depth, tally in tallies[n].items()} for n in passes},
        interval={str(n): {str(depth): tally.interval() for depth, tally in tallies[n].items()} for n in passes},
        floor={str(depth): max(by_depth[depth] for by_depth in guesses.values()) for depth in depths if guesses},
        guesses={name: {str(depth): share for depth, share in by_depth.items()} for name, by_depth in guesses.items()},
        answers={str(depth): answers[depth] for depth in depths},
        sequences={str(depth): tallies[passes[0]][depth].sequences for depth in depths},
        windows=windows,
        loss_by_window={
            str(n): {name: float(of_n[place] / loss_tokens[place]) for name, place in found_at.items()}
            for n, of_n in zip(passes, sums, strict=True)
        },
        tokens_by_window={name: int(loss_tokens[place]) for name, place in found_at.items()},
    )


def evaluate_run(
    path: Path,
    passes: list[int] | None = None,
    samples: int | None = None,
    test: list[str] | None = None,
    shards: list[str] | None = None,
) -> str:
    """Evaluate a run's newest checkpoint in this process; returns a table to print.

    Writes evaluation.json and evaluation.png into the run's folder and logs both to its MLflow run.

    Args:
        passes, samples: the recipe's by default.
        test: data.test with the secrets, if any, that config.yaml leaves out.
        shards: other ones to evaluate, of any length; then nothing is written.
    """
    folder = RunFolder(path)
    recipe = folder.recipe()
    if shards:
        to_read = _with_shards(recipe, shards)
    elif recipe.data.test is None:
        raise RecipeError(f"{folder.config}: data.test is null: the run has no test shards; write --shards SHARDS")
    else:
        to_read = _with_secrets(recipe, test, folder.config)
        check_folder(path, "")
    newest, depth_name = folder.newest_checkpoint(), _depth_name(to_read.data)
    with distributed_session() as topology:
        stage = HybridStage(recipe.model, recipe.sleep, topology.groups, draw=False).to(topology.device)
        newest.load_weights(stage, recipe.train.precision)
        result = evaluate(
            stage, to_read, passes or evaluation_passes(recipe), samples or recipe.evaluation.samples, topology
        )
    if shards:
        return "\n".join(
            [f"{path.name}, after step {newest.step:,}, on {' '.join(shards)}", *_tables(result, depth_name)]
        )
    table, picture = path / "evaluation.json", path / "evaluation.png"
    table.write_text(json.dumps({"step": newest.step, **asdict(result)}, indent=2) + "\n")
    title = f"{path.name}: held-out {'accuracy' if result.answers else 'loss'} after step {newest.step:,}"
    if result.answers:
        others = {windows: (other.accuracy, other.interval, other.floor) for windows, other in result.lengths.items()}
        draw_accuracy(
            result.accuracy,
            result.interval,
            result.floor,
            title=title,
            to=picture,
            lengths=others,
            depth_name=depth_name,
        )
    else:
        draw_loss(result.loss, result.loss_by_window, title=title, to=picture)
    tracker = Trackers.open(recipe, path, running=False)
    metrics = result.metrics()
    tracker.log_metrics(newest.step, main_results(metrics, recipe) | metrics)
    for file in (table, picture):
        tracker.log_artifact(file)
    tracker.close(status=None)
    return "\n".join([title, *_tables(result, depth_name), f"{table} and {picture.name} written"])


def _depth_name(data: DataConfig) -> str:
    """What the manifest beside the first test shards says that depth counts."""
    path = local_path(expand_shards(next(iter(data.tests.values())), "data.test")[0])
    return depth_name_of(read_manifest(path) if path else None)


def _tables(result: Evaluation, depth_name: str) -> list[str]:
    """Lines: what is found at each length."""
    lines = [f"{result.name}:"] if result.name else []
    lines += _described(result, depth_name)
    for windows, other in result.lengths.items():
        lines += [f"\n{windows} windows in place of {result.windows}:", *_described(other, depth_name)]
    for other in result.others.values():
        lines += ["", *_tables(other, depth_name)]
    return lines


def _described(result: Evaluation, depth_name: str) -> list[str]:
    """Lines: table of accuracy, best guess, losses."""
    lines = []
    if result.answers:
        shown = some_depths(result.answers)
        accuracy = {f"N={n}": {d: row[d] for d in shown} for n, row in result.accuracy.items()}
        interval = {f"N={n}": {d: row[d] for d in shown} for n, row in result.interval.items()}
        floor = {depth: result.floor[depth] for depth in shown if depth in result.floor}
        lines.append(format_accuracy(with_intervals(accuracy, interval) | {FLOOR_LABEL: floor}, depth_name))
        if len(shown) == len(result.answers):
            lines.append(best_guesses(result.guesses))
        lines.append(
            f"{sum(result.answers.values()):,} answers; ±: 95 %, with the answers of one sequence counted together"
        )
    lines.append("loss: " + ", ".join(f"N={n} {loss:.4f}" for n, loss in result.loss.items()))
    if result.bits_per_byte:
        lines.append("bits per byte: " + ", ".join(f"N={n} {bits:.4f}" for n, bits in result.bits_per_byte.items()))
    if len(result.tokens_by_window) > 1:
        rows = {f"N={n}": by_window for n, by_window in result.loss_by_window.items()}
        lines += ["loss by window of the document:", format_rows(rows, "window", decimals=3)]
    return lines


def _with_shards(recipe: Recipe, shards: list[str]) -> Recipe:
    """The recipe with `shards` as data.test, as long as the first one's samples."""
    length = stored_length(expand_shards(shards[0], "--shards")[0], recipe.data)
    data = {"test": shards, "sequence_length": length or recipe.data.sequence_length}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})


def _with_secrets(recipe: Recipe, test: list[str] | None, config: Path) -> Recipe:
    """The recipe in a run's `config`, with `test` as data.test; RecipeError unless they are the same shards."""
    assert recipe.data.test is not None
    if isinstance(recipe.data.test, dict):
        if test:
            raise RecipeError(f"--test: data.test in {config} are several sets by name: write --shards SHARDS")
        return recipe
    known = [recipe.data.test] if isinstance(recipe.data.test, str) else recipe.data.test
    if test and mask_values(test) != mask_values(known):
        given = mask_secrets(" ".join(test))
        raise RecipeError(
            f"--test {given}: not the shards of the run: data.test is {' '.join(known)} in {config}; "
            f"for other shards write --shards {given}"
        )
    for shard in test or known:
        if MASK in shard and local_path(shard) is None:
            raise RecipeError(
                f"data.test={shard}: {config} keeps no secrets: give the shards with theirs in --test, or keep them where "
                "the command that reads looks by itself, such as ~/.netrc"
            )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"test": test or known})})


def evaluation_passes(recipe: Recipe) -> list[int]:
    """The N to evaluate: the recipe's evaluation.passes, or the trained ones."""
    return recipe.evaluation.passes or sorted(set(recipe.sleep.pass_choices))


def _predict(
    stage: HybridStage, recipe: Recipe, batch: Batch, passes: int, topology: Topology, layer_states: LayerStates | None
) -> tuple[dict[tuple[int, int, int], tuple[int, ...]], torch.Tensor, LayerStates]:
    """The prediction for each answer, (row, start, stop) -> tokens; each token's loss [B, T]; the layer states."""
    tokens, loss_mask = pad_end(batch.tokens, batch.loss_mask, recipe.sequence_shards, recipe.model.pad_token_id)
    segments = plan_segments(
        tokens, loss_mask, recipe.model, recipe.sleep, passes, batch.probes, recipe.sequence_shards
    )
    micro_batch = MicroBatch.on(topology.device, segments, tokens, loss_mask, layer_states)
    predictions, losses, layer_states = predict(stage, micro_batch, topology)
    rows = predictions.tolist()
    answers = {span: tuple(rows[span[0]][slice(*span[1:])]) for span, _, _ in _answers(batch)}
    return answers, losses, layer_states


def _tally(
    batch: Batch, predictions: dict[tuple[int, int, int], tuple[int, ...]], passes: int
) -> Counter[tuple[int, int, str]]:
    """A batch's contribution to the sums of every Tally, (N, depth, its field) -> number."""
    asked: Counter[tuple[int, int]] = Counter()  # by row and depth
    right: Counter[tuple[int, int]] = Counter()
    for span, depth, answer in _answers(batch):
        asked[span[0], depth] += 1
        right[span[0], depth] += predictions[span] == answer
    sums: Counter[tuple[int, int, str]] = Counter()
    for (row, depth), m in asked.items():
        tally = Tally.of_sequence(right[row, depth], m)
        sums.update({(passes, depth, name): value for name, value in asdict(tally).items()})
    return sums


def _answers(batch: Batch) -> Iterator[tuple[tuple[int, int, int], int, tuple[int, ...]]]:
    """Every answer of a batch: its span (row, start, stop), its depth, its tokens."""
    for row, (tokens, answers) in enumerate(zip(batch.tokens.tolist(), batch.answers, strict=True)):
        for start, stop, depth in answers.tolist():
            yield (row, start, stop), depth, tuple(tokens[start:stop])
