"""What a layout costs before any process starts: `powernap plan`, for CUDA with NCCL. Nothing here imports torch."""

import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from powernap.model.parameters import parameters
from powernap.model.recompute import Recompute
from powernap.model.segments import Probe, Segment
from powernap.parallel.planning.choices import Choice, choices, in_words
from powernap.parallel.planning.groups import trained
from powernap.parallel.planning.layout import consolidation_flops, format_layout, head_flops, prediction_flops
from powernap.parallel.planning.memory import RESERVE, MemoryEstimate, fits, stage_memory, stage_parameters
from powernap.parallel.planning.timeline import Timeline, bubble, draw, peak_live, schedule, simulate
from powernap.parallel.planning.work import (
    PlanError,
    Recipe,
    micro_batches,
    segments_of,
    stage_work,
    step_flops,
    step_flops_by_passes,
    step_times,
    windows_slept_and_read,
)

MOST_STEPS = 2**20  # forward, of all stages: half a minute to simulate
COLOURS = (39, 208, 76, 170, 220, 44, 203, 141)  # of 256; windows cycle through them


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage; memory is that of each of its ranks."""

    stage: int
    first_block: int
    pattern: str
    parameters: int
    parameters_per_rank: int
    share_of_work: float  # of the model's FLOPs
    live_segments: int
    memory: MemoryEstimate


@dataclass(frozen=True)
class PhasePlan:
    """Steps in which nothing changes."""

    first_step: int
    last_step: int
    passes: dict[int, float]  # N -> share of the steps
    window: int
    eviction: str
    backprop_passes: int | None
    flops: int  # of all these steps, with N as often as it is drawn
    memory: int  # bytes of the fullest rank


@dataclass(frozen=True)
class Plan:
    """All that is known before a run starts."""

    data: int
    tensor: int
    pipeline: int
    ranks: int
    sequence_parallel: bool
    zero_stage: int
    precision: str
    optimizer: str
    recompute: Recompute
    offload_inputs: bool
    pattern: str
    pipeline_layout: str
    parameters: int
    trained_parameters: int
    window: int
    windows: int  # those of text are both read and slept on
    windows_slept: int
    windows_read: int
    probes: int
    windows_assumed: bool
    windows_from: str  # source of the windows that predict: the first "sample", the "recipe", or "assumed"
    passes: int
    segments: int
    tokens_per_sequence: int
    global_batch_size: int
    micro_batch_size: int
    micro_batches: int
    tokens_per_step: int
    flops_per_token_awake: int
    flops_per_token_asleep: int
    flops_per_step: int
    choices: list[Choice]  # of train.recompute and train.offload_inputs, and what each costs
    bubble: float
    bubble_formula: float
    stages: list[StagePlan]
    memory_limit: int | None
    fits: bool | None
    notes: list[str]
    picture: Timeline
    labels: list[str]
    phases: list[PhasePlan] = dataclasses.field(
        default_factory=list
    )  # of a run; if there are several, the rest is of the one
    # that takes most memory

    def as_json(self) -> str:
        """Everything but the picture."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("picture", "labels")
        }
        tables = {name: [dataclasses.asdict(row) for row in values[name]] for name in ("stages", "choices", "phases")}
        of_run = {"flops_of_run": self.flops_of_run, "assumed_seconds_of_run": self.seconds_of_run}
        return json.dumps({**values, **tables, **of_run}, indent=2)

    @property
    def flops_of_run(self) -> int:
        """Of all steps of its phases."""
        return sum(phase.flops for phase in self.phases)

    @property
    def seconds_of_run(self) -> float:
        """If every rank computes ASSUMED_FLOPS a second from the first step to the last."""
        return self.flops_of_run / self.ranks / ASSUMED_FLOPS

    def text(self, colour: bool = False) -> str:
        """The plan for a terminal of 80 columns."""
        shards = ", sequence-parallel" if self.sequence_parallel else ""
        source = {
            "sample": "as in the first sample of data.train",
            "recipe": "as sleep.every_window says",
            "assumed": "if only the last window predicts",
        }[self.windows_from]
        probes = f", {self.probes} of them forgotten" if self.probes else ""
        all_train = self.trained_parameters == self.parameters
        trains = "" if all_train else f", {in_counts(self.trained_parameters)} trained"
        micro_batches = f"{self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
        facts = {
            "model": f"{in_counts(self.parameters)} parameters{trains}, {len(self.pattern)} blocks {_letters(self.pattern, 40)}",
            "ranks": f"{self.ranks} = data {self.data} x tensor {self.tensor} x pipeline {self.pipeline}{shards}",
            "training": f"{self.precision}, {self.optimizer}, ZeRO {self.zero_stage}, "
            f"recompute {in_words(self.recompute, self.offload_inputs)}",
            "sequence": f"{self.tokens_per_sequence:,} tokens in {self.windows} windows of {self.window}: "
            f"{self.windows_slept} slept on (N={self.passes}), {self.windows_read} read once{probes}",
            "segments": f"{self.segments} a sequence, {source}",
            "step": f"{self.global_batch_size} sequences, {self.tokens_per_step:,} tokens; a rank runs "
            f"{micro_batches} of {self.micro_batch_size}",
            "FLOPs": f"a token forward {in_units(self.flops_per_token_awake)} awake, "
            f"{in_units(self.flops_per_token_asleep)} asleep; a step {in_units(self.flops_per_step)}",
        }
        if self.phases:
            steps = self.phases[-1].last_step
            tokens = in_counts(steps * self.tokens_per_step)
            facts["run"] = f"{steps:,} steps, {tokens} tokens, {in_units(self.flops_of_run)} FLOPs"
            if self.precision == "bf16":
                facts["time"] = (
                    f"{_in_time(self.seconds_of_run)} if each GPU reaches {ASSUMED_FLOPS / 1e12:.0f} TFLOP/s "
                    f"(assumed, not measured)"
                )
        lines = [f"{name:<10} {fact}" for name, fact in facts.items()]
        if len(self.phases) > 1:
            lines += ["", *self._phase_table()]
        lines += ["", *self._stage_table(), "", *self._verdict(), "", *self._choice_table(), "", self._bubble()]
        if self.pipeline > 1:
            colours = [f"\033[38;5;{COLOURS[ord(label[0]) % len(COLOURS)]}m" for label in self.labels]
            lines += [*draw(self.picture, self.labels, 80, colours if colour else None), *self._legend()]
        for note in self.notes:
            lines += textwrap.wrap(f"note: {note}", 80, subsequent_indent="      ")
        return "\n".join(lines)

    def _stage_table(self) -> list[str]:
        lines = [
            f"{'':<19} {'params':>6} {'live':>5}  bytes of a rank on CUDA with NCCL",
            f"{'stage':<5} {'blocks':<13} {'a rank':>6} {'segm.':>5} weights   grads  optim.   saved  activ.   total",
        ]
        for s in self.stages:
            blocks = f"{s.first_block}-{s.first_block + len(s.pattern) - 1} {_letters(s.pattern, 7)}"
            m = s.memory
            parts = (m.weights, m.gradients + m.buffers, m.optimizer, m.segments, m.activations, m.total)
            numbers = " ".join(f"{in_bytes(n):>7}" for n in parts)
            lines.append(
                f"{s.stage:<5} {blocks:<13} {in_counts(s.parameters_per_rank):>6} {s.live_segments:>5} {numbers}"
            )
        saved = "of two segments" if self.offload_inputs else "of live segments"
        activations = {
            "none": "all of live segments",
            "selective": "what live segments keep, and of one block the rest",
            "blocks": "of one block" + ("" if self.offload_inputs else ", and inputs of live segments' other blocks"),
            "segment": "of the segment that is recomputed",
            "nested": "of one block, and its segment's inputs of blocks",
        }[self.recompute]
        lines += [
            f"grads: with DeepSpeed's buffers; saved: inputs {saved};",
            f"activ.: {activations}, estimated",
        ]
        if any(s.memory.step > s.memory.buffers + s.memory.segments + s.memory.activations for s in self.stages):
            lines.append("total: while the optimizer steps, when saved and activ. are gone")
        return lines

    def _phase_table(self) -> list[str]:
        lines = [f"{'steps':<19} {'N':<16} {'window':>6} {'eviction':>8} {'gradient':>8} {'FLOPs':>7} {'memory':>7}"]
        for phase in self.phases:
            steps = f"{phase.first_step:,}-{phase.last_step:,}"
            drawn = " ".join(f"{n}:{share:.0%}" if share < 1 else str(n) for n, share in phase.passes.items())
            through = "all" if phase.backprop_passes is None else f"last {phase.backprop_passes}"
            cost = f"{in_units(phase.flops):>7} {in_bytes(phase.memory):>7}"
            lines.append(f"{steps:<19} {drawn:<16} {phase.window:>6} {phase.eviction:>8} {through:>8} {cost}")
        return [*lines, "the rest is of the steps that take most memory"]

    def _verdict(self) -> list[str]:
        fullest = max(self.stages, key=lambda s: s.memory.total)
        total, host = fullest.memory.total, max(s.memory.host for s in self.stages)
        lines = [f"memory     {in_bytes(total)} on a rank of stage {fullest.stage}"]
        if host:
            lines.append(f"           and {in_bytes(host)} in host memory for each rank's optimizer states")
        if self.offload_inputs:
            inputs = max(s.memory.host_inputs for s in self.stages)
            lines.append(f"           and {in_bytes(inputs)} in pinned host memory for each rank's inputs of segments")
        if self.memory_limit is None:
            return lines
        left = (1 - RESERVE) * self.memory_limit - total
        reserve = f"besides a reserve of {RESERVE:.0%} of {in_bytes(self.memory_limit)}"
        answer = f"yes, {in_bytes(left)} to spare" if self.fits else f"NO, {in_bytes(-left)} too much"
        return [*lines, f"fits       {answer} {reserve}", *self._cheaper()]

    def _cheaper(self) -> list[str]:
        """The choice with the fewest FLOPs, if it fits and the recipe has another."""
        assert self.memory_limit is not None
        room = (1 - RESERVE) * self.memory_limit
        best = min((one for one in self.choices if one.bytes <= room), key=lambda one: one.flops_per_step, default=None)
        if len(self.phases) > 1 or best is None or best.flops_per_step > 0.99 * self.flops_per_step:
            return []
        less = 1 - best.flops_per_step / self.flops_per_step
        offload = " train.offload_inputs=true" if best.offload_inputs else ""
        return [f"           train.recompute={best.recompute}{offload} fits, too: {less:.0%} fewer FLOPs"]

    def _choice_table(self) -> list[str]:
        lines = [f"{'recompute':<30} {'FLOPs':>7} {'a rank':>8} {'host':>8}"]
        for choice in self.choices:
            own = (choice.recompute, choice.offload_inputs) == (self.recompute, self.offload_inputs)
            name = in_words(choice.recompute, choice.offload_inputs) + ", as here" * own
            host = in_bytes(choice.host) if choice.host else "-"
            lines.append(f"{name:<30} {in_units(choice.flops_per_step):>7} {in_bytes(choice.bytes):>8} {host:>8}")
        return lines

    def _bubble(self) -> str:
        if self.pipeline == 1:
            return "schedule   one stage: a micro-batch's segments forward, then backward; no bubble"
        formula = f"{self.bubble_formula:.1%} by formula if all steps were equal"
        return f"bubble     {self.bubble:.1%} simulated from FLOPs, {formula}"

    def _legend(self) -> list[str]:
        first = self.labels[0]
        kind = "prediction" if first[1] == "?" else f"pass {first[1]}"
        return [
            f"         {first} forward, window {first[0]}, {kind}; {first.upper()} backward; x? window x predicts;",
            "         -- continues; . waits; .. the middle is left out",
        ]


def plan(
    recipe: Recipe,
    predicts: Sequence[bool] | None = None,
    memory_limit: int | None = None,
    probes: Sequence[Probe] = (),
) -> Plan:
    """Compute what `recipe` costs.

    Args:
        recipe: validated, so its layout can run.
        predicts: for each window whether it holds loss tokens; None: as the recipe says, see `segments_of`.
        memory_limit: bytes a rank may use.
        probes: see model/segments.py.

    Raises:
        PlanError: if the schedule would take minutes to simulate.
    """
    model, sleep, parallel = recipe.model, recipe.sleep, recipe.parallel
    segments, passes, batches = (
        segments_of(recipe, predicts, probes),
        max(recipe.sleep.pass_choices),
        micro_batches(recipe),
    )
    if (steps := parallel.pipeline * batches * len(segments)) > MOST_STEPS:
        raise PlanError(
            f"{parallel.pipeline} stages x {batches:,} micro-batches x {len(segments):,} segments are {steps:,} steps to "
            f"simulate, more than {MOST_STEPS:,}: write a larger train.micro_batch_size or model.window"
        )
    weights = parameters(model, sleep, range(model.num_layers))
    memories = [stage_memory(recipe, segments, stage) for stage in range(parallel.pipeline)]
    timeline = simulate(schedule(parallel.pipeline, batches, len(segments)), *step_times(recipe, segments))
    slept, read = windows_slept_and_read(segments)
    tokens = recipe.data.sequence_length - 1
    return Plan(
        data=parallel.data,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        ranks=parallel.world_size,
        sequence_parallel=parallel.sequence,
        zero_stage=recipe.zero.stage,
        precision=recipe.train.precision,
        optimizer=recipe.optimizer.name,
        recompute=recipe.train.recompute,
        offload_inputs=recipe.train.offload_inputs,
        pattern=model.pattern,
        pipeline_layout=format_layout(model.pattern, recipe.stage_blocks),
        parameters=sum(w.size() for w in weights),
        trained_parameters=sum(w.size() for w in trained(recipe, weights)),
        window=model.window,
        windows=len({segment.window for segment in segments}),
        windows_slept=slept,
        windows_read=read,
        probes=sum(segment.probe for segment in segments),
        windows_assumed=predicts is None and not sleep.every_window,
        windows_from="sample" if predicts is not None else "recipe" if sleep.every_window else "assumed",
        passes=passes,
        segments=len(segments),
        tokens_per_sequence=tokens,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.micro_batch_size,
        micro_batches=batches,
        tokens_per_step=recipe.train.global_batch_size * tokens,
        flops_per_token_awake=sum(prediction_flops(model, sleep)) + head_flops(model),
        flops_per_token_asleep=sum(map(sum, consolidation_flops(model, sleep, passes))),
        flops_per_step=step_flops(recipe, segments),
        choices=choices(recipe, segments),
        bubble=timeline.bubble,
        bubble_formula=bubble(parallel.pipeline, batches, len(segments)),
        stages=_stages(recipe, segments, memories),
        memory_limit=memory_limit,
        fits=None if memory_limit is None else all(fits(memory, memory_limit) for memory in memories),
        notes=_notes(recipe),
        picture=timeline,
        labels=[segment.label for segment in segments],
    )


def plan_run(
    recipe: Recipe,
    windows: Callable[[Recipe], tuple[Sequence[bool] | None, Sequence[Probe]]],
    memory_limit: int | None = None,
) -> Plan:
    """`plan` of the part of a run that takes most memory, with what changes over its steps.

    Args:
        windows: a recipe's windows that predict, and its probes.
    """
    ends = [*(start for start, _ in recipe.phases[1:]), recipe.train.steps]
    plans, phases = [], []
    for (start, part), end in zip(recipe.phases, ends, strict=True):
        predicts, probes = windows(part)
        plans.append(plan(part, predicts, memory_limit, probes))
        flops = step_flops_by_passes(part, predicts, probes)
        per_step = sum(share * flops[passes] for passes, share in part.sleep.pass_shares.items())
        phases.append(
            PhasePlan(
                first_step=start + 1,
                last_step=end,
                passes=part.sleep.pass_shares,
                window=part.model.window,
                eviction=part.sleep.eviction,
                backprop_passes=part.sleep.backprop_passes,
                flops=round(per_step * (end - start)),
                memory=max(stage.memory.total for stage in plans[-1].stages),
            )
        )
    fullest = plans[max(range(len(plans)), key=lambda number: phases[number].memory)]
    fits = None if memory_limit is None else all(one.fits for one in plans)
    return replace(fullest, fits=fits, phases=phases)


def _stages(recipe: Recipe, segments: list[Segment], memories: list[MemoryEstimate]) -> list[StagePlan]:
    work, stages = stage_work(recipe, segments), []
    for stage, (blocks, memory) in enumerate(zip(recipe.stage_blocks, memories, strict=True)):
        weights = stage_parameters(recipe, stage)
        stages.append(
            StagePlan(
                stage=stage,
                first_block=blocks.start,
                pattern=recipe.model.pattern[blocks.start : blocks.stop],
                parameters=sum(w.size() for w in weights),
                parameters_per_rank=sum(w.size(recipe.parallel.tensor) for w in weights),
                share_of_work=work[stage] / sum(work),
                live_segments=peak_live(recipe.parallel.pipeline, stage, micro_batches(recipe), len(segments)),
                memory=memory,
            )
        )
    return stages


ASSUMED_FLOPS = 400e12  # a second, 40 % of an H100's peak in bf16


# A product writes its bfloat16 gradient, adding it to the float32 sum reads both and writes one: 12 bytes a parameter at 3 TB/s. A
# recomputed segment takes 8 FLOPs a parameter and token at 400 TFLOP/s. So 200 over its tokens, a tenth here.
ENOUGH_TOKENS = 2048


def _notes(recipe: Recipe) -> list[str]:
    notes, choices = [], recipe.sleep.pass_choices
    if len(choices) > 1:
        notes.append(f"N is drawn from {choices}: all numbers are for N={max(choices)}")
    if recipe.zero.stage >= 2:
        notes.append("ZeRO 2 and 3 hold all gradients until a step's last backward pass")
    tokens = recipe.model.window * recipe.micro_batch_size
    if recipe.train.precision == "bf16" and tokens < ENOUGH_TOKENS:
        needed = math.ceil(ENOUGH_TOKENS / recipe.model.window)
        notes.append(
            f"a segment has {tokens:,} tokens; each adds to all gradients, on a GPU about {200 / tokens:.0%} of its compute "
            f"(by arithmetic): train.micro_batch_size={needed} has {needed * recipe.model.window:,}"
        )
    return notes


def _letters(pattern: str, most: int) -> str:
    """A pattern, or the count of each letter if it is too long."""
    if len(pattern) <= most:
        return pattern
    return " ".join(f"{pattern.count(kind)}{kind}" for kind in sorted(set(pattern)))


def in_counts(number: float) -> str:
    """Of parameters and tokens, as the field writes them: 1.4B."""
    return _scaled(number, ("", "k", "M", "B", "T"))


def in_units(number: float) -> str:
    return _scaled(number, ("", "k", "M", "G", "T", "P", "E"))


def in_bytes(number: float) -> str:
    return _scaled(number, (" B", " kB", " MB", " GB", " TB", " PB"))


def _in_time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """Three digits and a decimal unit."""
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 or number >= 99.95 else 1
    return f"{number:.{digits}f}{units[power]}"
