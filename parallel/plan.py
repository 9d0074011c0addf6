"""What a layout costs before any process starts: parameters, bytes, FLOPs, bubble, and better layouts for the same job.

Parameters are exact (the tests compare them with the model's own). Weights, gradients and optimizer states follow
DeepSpeed's partitioning to the byte; live segments follow the schedule. Activations are an estimate, and what CUDA, NCCL
and the allocator take is left to a reserve. Nothing here imports torch.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from powernap.model.config import ATTENTION, GATED_DELTA_NET, ModelConfig, SleepConfig
from powernap.parallel.layout import (
    LayoutError,
    consolidation_flops,
    embedding_flops,
    format_layout,
    head_flops,
    prediction_flops,
    sequence_costs,
    split_layers,
)
from powernap.parallel.timeline import (
    ScheduleError,
    Timeline,
    bubble,
    check_micro_batches,
    draw,
    peak_live,
    schedule,
    simulate,
)

FP32, BF16 = 4, 2  # bytes
RESERVE = 0.1  # of the memory: CUDA context, NCCL's buffers, fragments, DeepSpeed's buckets
FLA_CHUNK = 64  # tokens in a chunk of FLA's kernel

# What `suggest` assumes. Only the ratio of communication to computation matters to the order.
NODE = 8  # ranks with fast links between them: the largest tensor parallelism
FLOPS_PER_BYTE_IN_NODE = 1_000  # such as 400 TFLOP/s and 400 GB/s
FLOPS_PER_BYTE_BETWEEN_NODES = 10_000  # such as 400 TFLOP/s and 40 GB/s
SATURATION = 512  # tokens of a micro-batch's window at which a device does half of what it can
MOST_MICRO_BATCHES = 512

COLOURS = (39, 208, 76, 170, 220, 44, 203, 141)  # of 256, one for each window in turn


class PlanError(ValueError):
    """A layout that cannot run: one line that says what to write instead."""


class Weight(NamedTuple):
    """One parameter of the model as HybridStage names it."""

    name: str
    shape: tuple[int, ...]
    split: bool = (
        False  # over tensor-parallel ranks, along its first dimension, or the last for out_proj and linear_fc2
    )

    def size(self, tensor: int = 1) -> int:
        return math.prod(self.shape) // (tensor if self.split else 1)


class Segment(NamedTuple):
    """One pass over one window, as model/segments.py cuts it, with what it computes."""

    window: int
    pass_number: int
    tokens: int
    flops: list[int]  # of every block, per token
    predicts: bool
    with_grad: bool

    @property
    def label(self) -> str:
        """Two characters: the window as a letter, the pass as a digit, "?" where it predicts."""
        window = chr(ord("a") + self.window % 26)
        return window + ("?" if self.predicts else str(self.pass_number % 10))


@dataclass(frozen=True)
class Job:
    """The sections of a recipe that a plan reads."""

    model: ModelConfig
    sleep: SleepConfig
    sequence_length: int
    train: Any
    optimizer: Any
    parallel: Any
    zero: Any

    @classmethod
    def of(cls, recipe: Any) -> "Job":
        """From a train.config.Recipe, or whatever has the same sections."""
        fields = {name: getattr(recipe, name) for name in ("model", "sleep", "train", "optimizer", "parallel", "zero")}
        return cls(sequence_length=recipe.data.sequence_length, **fields)

    @property
    def sequences_per_rank(self) -> int:
        return self.train.global_batch_size // self.parallel.data

    @property
    def micro_batch_size(self) -> int:
        """As the recipe says, or as it is by default: one micro-batch, with a pipeline one for each stage."""
        return self.train.micro_batch_size or max(1, self.sequences_per_rank // self.parallel.pipeline)

    @property
    def micro_batches(self) -> int:
        return self.sequences_per_rank // self.micro_batch_size

    @property
    def passes(self) -> int:
        """N, the largest where it is drawn."""
        return max(self.sleep.pass_choices)

    @property
    def bytes_per_number(self) -> int:
        return BF16 if self.train.precision == "bf16" else FP32

    @property
    def sequence_shards(self) -> int:
        """Ranks that share the tokens between mixers and MLPs."""
        return self.parallel.tensor if self.parallel.sequence else 1


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int  # float32 master weights and moments; 0 if offloaded
    segments: int  # hidden states, fast weights and cached keys and values of the live segments
    activations: int  # estimate: of the segment that is recomputed, or of all live ones without recomputation
    total: int
    host: int  # offloaded optimizer states


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
    memory: Memory


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
    recompute: bool
    pattern: str
    pipeline_layout: str
    parameters: int
    window: int
    windows_slept: int
    windows_read: int
    windows_assumed: bool
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
    bubble: float
    bubble_formula: float
    stages: list[StagePlan]
    memory_limit: int | None
    fits: bool | None
    notes: list[str]
    picture: Timeline
    labels: list[str]

    def as_json(self) -> str:
        """Everything but the picture."""
        values = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("picture", "labels")
        }
        return json.dumps({**values, "stages": [dataclasses.asdict(s) for s in self.stages]}, indent=2)

    def text(self, colour: bool = False) -> str:
        """The plan for a terminal of 80 columns."""
        shards = ", sequence-parallel" if self.sequence_parallel else ""
        windows = self.windows_slept + self.windows_read
        source = "if only the last window predicts" if self.windows_assumed else "as in the first sample of data.train"
        micro_batches = f"{self.micro_batches} micro-batch{'es' if self.micro_batches > 1 else ''}"
        facts = {
            "model": f"{_count(self.parameters)} parameters, {len(self.pattern)} blocks {_letters(self.pattern, 40)}",
            "ranks": f"{self.ranks} = data {self.data} x tensor {self.tensor} x pipeline {self.pipeline}{shards}",
            "training": f"{self.precision}, {self.optimizer}, ZeRO {self.zero_stage}, "
            f"activations {'recomputed' if self.recompute else 'kept'}",
            "sequence": f"{self.tokens_per_sequence:,} tokens in {windows} windows of {self.window}: {self.windows_slept} "
            f"slept on (N={self.passes}), {self.windows_read} read once",
            "segments": f"{self.segments} a sequence, {source}",
            "step": f"{self.global_batch_size} sequences, {self.tokens_per_step:,} tokens; a rank runs "
            f"{micro_batches} of {self.micro_batch_size}",
            "FLOPs": f"a token forward {_count(self.flops_per_token_awake)} awake, "
            f"{_count(self.flops_per_token_asleep)} asleep; a step {_count(self.flops_per_step)}",
        }
        lines = [f"{name:<10} {fact}" for name, fact in facts.items()]
        lines += ["", *self._stage_table(), "", *self._verdict(), "", self._bubble()]
        if self.pipeline > 1:
            colours = [f"\033[38;5;{COLOURS[ord(label[0]) % len(COLOURS)]}m" for label in self.labels]
            lines += [*draw(self.picture, self.labels, 80, colours if colour else None), *self._legend()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _stage_table(self) -> list[str]:
        lines = [
            f"{'':<19} {'params':>6} {'live':>5}  bytes of a rank",
            f"{'stage':<5} {'blocks':<13} {'a rank':>6} {'segm.':>5} weights   grads  optim.   saved  activ.   total",
        ]
        for s in self.stages:
            blocks = f"{s.first_block}-{s.first_block + len(s.pattern) - 1} {_letters(s.pattern, 7)}"
            memory = (s.memory.weights, s.memory.gradients, s.memory.optimizer, s.memory.segments, s.memory.activations)
            numbers = " ".join(f"{_bytes(n):>7}" for n in (*memory, s.memory.total))
            lines.append(f"{s.stage:<5} {blocks:<13} {_count(s.parameters_per_rank):>6} {s.live_segments:>5} {numbers}")
        what = "the one recomputed" if self.recompute else "all of them"
        return [*lines, f"saved: inputs of the live segments; activ.: of {what}, estimated"]

    def _verdict(self) -> list[str]:
        fullest = max(self.stages, key=lambda s: s.memory.total)
        total, host = fullest.memory.total, max(s.memory.host for s in self.stages)
        lines = [f"memory     {_bytes(total)} on a rank of stage {fullest.stage}"]
        if host:
            lines.append(f"           and {_bytes(host)} in host memory for each rank's optimizer states")
        if self.memory_limit is None:
            return lines
        left = (1 - RESERVE) * self.memory_limit - total
        reserve = f"besides a reserve of {RESERVE:.0%} of {_bytes(self.memory_limit)}"
        answer = f"yes, {_bytes(left)} to spare" if self.fits else f"NO, {_bytes(-left)} too much"
        return [*lines, f"fits       {answer} {reserve}"]

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
            "         -- goes on; . waits; .. the middle is left out",
        ]


def plan(recipe: Any, predicts: Sequence[bool] | None = None, memory_limit: int | None = None) -> Plan:
    """Work out what `recipe` costs.

    Args:
        recipe: a train.config.Recipe, or whatever has its sections model, sleep, data, train, optimizer, parallel, zero.
        predicts: for each window whether it holds loss tokens; None: only the last one does.
        memory_limit: bytes a rank may use.

    Raises:
        PlanError, LayoutError, ScheduleError: if the layout cannot run.
    """
    job = Job.of(recipe)
    check_layout(job)
    segments = cut(job, predicts)
    costs = _costs(job, segments)
    stages = split_layers(job.model.pattern, job.parallel.pipeline, job.parallel.pipeline_layout, costs)
    memories = [stage_memory(job, blocks, segments, stage) for stage, blocks in enumerate(stages)]
    work = [_work(job.model, costs, blocks) for blocks in stages]
    timeline = simulate(
        schedule(job.parallel.pipeline, job.micro_batches, len(segments)), *_step_times(job, segments, stages)
    )
    slept = len({s.window for s in segments if not s.predicts})
    read = sum(s.predicts for s in segments)
    tokens = job.sequence_length - 1
    return Plan(
        data=job.parallel.data,
        tensor=job.parallel.tensor,
        pipeline=job.parallel.pipeline,
        ranks=job.parallel.data * job.parallel.tensor * job.parallel.pipeline,
        sequence_parallel=job.parallel.sequence,
        zero_stage=job.zero.stage,
        precision=job.train.precision,
        optimizer=job.optimizer.name,
        recompute=job.train.recompute,
        pattern=job.model.pattern,
        pipeline_layout=format_layout(job.model.pattern, stages),
        parameters=sum(w.size() for w in parameters(job.model, job.sleep, range(job.model.num_layers))),
        window=job.model.window,
        windows_slept=slept,
        windows_read=read,
        windows_assumed=predicts is None,
        passes=job.passes,
        segments=len(segments),
        tokens_per_sequence=tokens,
        global_batch_size=job.train.global_batch_size,
        micro_batch_size=job.micro_batch_size,
        micro_batches=job.micro_batches,
        tokens_per_step=job.train.global_batch_size * tokens,
        flops_per_token_awake=sum(prediction_flops(job.model, job.sleep)) + head_flops(job.model),
        flops_per_token_asleep=sum(map(sum, consolidation_flops(job.model, job.sleep, job.passes))),
        flops_per_step=step_flops(job, segments),
        bubble=timeline.bubble,
        bubble_formula=bubble(job.parallel.pipeline, job.micro_batches, len(segments)),
        stages=[
            StagePlan(
                stage=stage,
                first_block=blocks.start,
                pattern=job.model.pattern[blocks.start : blocks.stop],
                parameters=sum(w.size() for w in parameters(job.model, job.sleep, blocks)),
                parameters_per_rank=sum(w.size(job.parallel.tensor) for w in parameters(job.model, job.sleep, blocks)),
                share_of_work=work[stage] / sum(work),
                live_segments=live_segments(job, segments, stage),
                memory=memories[stage],
            )
            for stage, blocks in enumerate(stages)
        ],
        memory_limit=memory_limit,
        fits=None if memory_limit is None else all(fits(memory, memory_limit) for memory in memories),
        notes=_notes(job),
        picture=timeline,
        labels=[segment.label for segment in segments],
    )


def check_layout(job: Job) -> None:
    """Raise PlanError or ScheduleError if the processes cannot share the work so."""
    model, train, parallel = job.model, job.train, job.parallel
    sizes = {
        "num_attention_heads": model.num_attention_heads,
        "gdn_heads": model.gdn_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
    }
    for name, size in sizes.items():
        if size % parallel.tensor:
            raise PlanError(
                f"parallel.tensor={parallel.tensor} must divide model.{name}={size}: write parallel.tensor="
                f"{max(t for t in range(1, parallel.tensor) if not any(s % t for s in sizes.values()))}"
            )
    if parallel.sequence:
        for length in sorted(
            {min(model.window, job.sequence_length - 1), (job.sequence_length - 1) % model.window} - {0}
        ):
            if length % parallel.tensor:
                raise PlanError(
                    f"parallel.sequence=true splits a window of {length} tokens over parallel.tensor={parallel.tensor} "
                    "ranks, which must divide it: write parallel.sequence=false"
                )
    if parallel.pipeline > 1 and job.zero.stage > 1:
        raise PlanError(
            f"zero.stage={job.zero.stage} cannot run beside parallel.pipeline={parallel.pipeline}: DeepSpeed would reduce "
            "a gradient before every segment has added to it: write zero.stage=1"
        )
    if train.global_batch_size % parallel.data:
        raise PlanError(
            f"train.global_batch_size={train.global_batch_size} must be a multiple of parallel.data={parallel.data}"
        )
    if job.sequences_per_rank % job.micro_batch_size:
        raise PlanError(
            f"micro-batches of {job.micro_batch_size} do not divide the {job.sequences_per_rank} sequences of a rank "
            "(train.global_batch_size / parallel.data): write train.micro_batch_size=1 or another divisor"
        )
    check_micro_batches(parallel.pipeline, job.micro_batches)


def cut(job: Job, predicts: Sequence[bool] | None = None) -> list[Segment]:
    """The segments of a sequence, as model/segments.py cuts a batch.

    Raises:
        PlanError: if `predicts` does not name every window.
    """
    length, window = job.sequence_length - 1, job.model.window
    count = math.ceil(length / window)
    predicts = [number == count - 1 for number in range(count)] if predicts is None else predicts
    if len(predicts) != count:
        raise PlanError(f"{length} tokens are {count} windows of model.window={window}, not {len(predicts)}")
    awake = prediction_flops(job.model, job.sleep)
    asleep = consolidation_flops(job.model, job.sleep, job.passes)
    backprop = job.sleep.backprop_passes or job.passes
    segments = []
    for number in range(count):
        tokens = min(window, length - number * window)
        if predicts[number]:
            segments.append(Segment(number, 1, tokens, awake, True, True))
            continue
        segments += [
            Segment(number, done + 1, tokens, flops, False, done >= job.passes - backprop)
            for done, flops in enumerate(asleep)
        ]
    return segments


def parameters(model: ModelConfig, sleep: SleepConfig, blocks: range) -> list[Weight]:
    """The parameters of the stage that owns `blocks`, named and shaped as in model/stage.py, whole over tensor ranks."""
    first, last = blocks.start == 0, blocks.stop == model.num_layers
    vocabulary = (model.vocab_size, model.hidden_size)
    weights = []
    if first or (last and model.tie_embeddings):
        weights.append(Weight("embedding.weight", vocabulary, split=True))
    if first and sleep.pass_norm:
        weights.append(Weight("pass_norm.weight", (model.hidden_size,)))
    for index, block in enumerate(blocks):
        prefix = f"decoder.layers.{index}."
        weights += [w._replace(name=prefix + w.name) for w in _block_parameters(model, model.pattern[block])]
    if last:
        weights.append(Weight("decoder.final_layernorm.weight", (model.hidden_size,)))
        if not model.tie_embeddings:
            weights.append(Weight("output_layer.weight", vocabulary, split=True))
    return weights


def _block_parameters(model: ModelConfig, kind: str) -> Iterator[Weight]:
    width, ffn, heads = model.hidden_size, model.ffn_hidden_size, model.gdn_heads
    d_k, d_v = model.gdn_key_dim, model.gdn_value_dim
    yield Weight("input_layernorm.weight", (width,))
    if kind == GATED_DELTA_NET:
        yield Weight("self_attention.conv_weight", (heads, 2 * d_k + d_v, model.conv_kernel), split=True)
        yield Weight("self_attention.A_log", (heads,), split=True)
        yield Weight("self_attention.dt_bias", (heads,), split=True)
        yield Weight("self_attention.in_proj.weight", (heads * (2 * d_k + 2 * d_v + 2), width), split=True)
        yield Weight("self_attention.out_proj.weight", (width, heads * d_v), split=True)
        yield Weight("self_attention.norm.weight", (d_v,))
    else:
        yield Weight("self_attention.qkv_proj.weight", (3 * width, width), split=True)
        yield Weight("self_attention.out_proj.weight", (width, width), split=True)
    yield Weight("pre_mlp_layernorm.weight", (width,))
    yield Weight("mlp.linear_fc1.weight", (2 * ffn, width), split=True)
    yield Weight("mlp.linear_fc2.weight", (width, ffn), split=True)


def optimizer_groups(weights: list[Weight], optimizer: str) -> list[tuple[list[Weight], int]]:
    """The optimizer's parameter groups and the moments it keeps for each, as train/optimizer.py makes them."""
    matrices = [w for w in weights if len(w.shape) == 2 and not w.name.startswith("embedding.")]
    others = [w for w in weights if w not in matrices]
    if optimizer == "adamw":
        groups = [(matrices, 2), (others, 2)]
    else:
        inside = [w for w in matrices if w.name.startswith("decoder.")]
        groups = [(inside, 1), ([w for w in matrices if w not in inside], 2), (others, 2)]
    return [(group, moments) for group, moments in groups if group]


def state_bytes(job: Job, weights: list[Weight]) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of one rank.

    ZeRO 1 and 2 flatten each parameter group and pad it to a multiple of twice the data ranks (deepspeed 0.19.8,
    runtime/zero/stage_1_and_2.py and bf16_optimizer.py: nccl_start_alignment_factor = 2); ZeRO 3 pads each parameter to a
    multiple of the data ranks (partition_parameters.py: _padding_size). From stage 1 on the optimizer steps a float32
    copy of its partition, in fp32 as well. Gradients are added up in float32.

    Every segment adds to every gradient, so none can be reduced before a micro-batch's last backward step: ZeRO 2 and 3
    hold the micro-batch's own gradients beside their partition, and only many data ranks make that less than stage 1.
    """
    ranks, stage, size = job.parallel.data, job.zero.stage, job.bytes_per_number
    whole = sum(w.size(job.parallel.tensor) for w in weights)
    padded = held = moments = 0  # numbers: all, of this rank, of optimizer states of this rank
    for group, per_number in optimizer_groups(weights, job.optimizer.name):
        sizes = [w.size(job.parallel.tensor) for w in group]
        if stage == 0:
            full, part = sum(sizes), sum(sizes)
        elif stage == 3:
            part = sum(math.ceil(n / ranks) for n in sizes)
            full = part * ranks
        else:
            full = _round_up(sum(sizes), 2 * ranks)
            part = full // ranks
        padded, held, moments = padded + full, held + part, moments + part * per_number
    has_master = stage > 0 or size == BF16
    kept = size * (held if stage == 3 else padded)
    if stage <= 1:
        gradients = FP32 * (whole if size == FP32 else padded)
    else:
        gradients = size * whole + FP32 * held
    return kept, gradients, FP32 * (moments + held * has_master)


def stage_memory(job: Job, blocks: range, segments: list[Segment], stage: int) -> Memory:
    """Bytes of a rank of one pipeline stage."""
    weights, gradients, optimizer = state_bytes(job, parameters(job.model, job.sleep, blocks))
    live = live_segments(job, segments, stage)
    tokens = max(segment.tokens for segment in segments)
    hidden = tokens // job.sequence_shards * job.micro_batch_size * job.model.hidden_size * job.bytes_per_number
    held = hidden + carried_bytes(job, blocks)
    computed = [segment_activations(job, blocks, segment) for segment in segments if segment.with_grad]
    activations = max(computed) if job.train.recompute else live * sum(computed) // len(computed)
    if job.zero.stage == 3:  # one block's weights are gathered at a time
        activations += job.bytes_per_number * max(
            sum(w.size(job.parallel.tensor) for w in _block_parameters(job.model, kind)) for kind in job.model.pattern
        )
    host = optimizer if job.zero.offload else 0
    total = weights + gradients + optimizer - host + live * held + activations
    return Memory(weights, gradients, optimizer - host, live * held, activations, total, host)


def live_segments(job: Job, segments: list[Segment], stage: int) -> int:
    """The most segments a stage keeps at once. Those that no gradient passes through keep nothing."""
    live = peak_live(job.parallel.pipeline, stage, job.micro_batches, len(segments))
    return math.ceil(live * sum(segment.with_grad for segment in segments) / len(segments))


def carried_bytes(job: Job, blocks: range) -> int:
    """Bytes that a stage carries from segment to segment (model/fast_weights.py).

    A gated-delta-net block's state [b, heads/TP, d_k, d_v] in float32; under sliding eviction also an attention block's
    keys and values [2, b, heads/TP, L-1, head_dim].
    """
    model, pattern = job.model, job.model.pattern[blocks.start : blocks.stop]
    state = model.gdn_heads // job.parallel.tensor * model.gdn_key_dim * model.gdn_value_dim * FP32
    cache = 2 * (model.window - 1) * model.hidden_size // job.parallel.tensor * job.bytes_per_number
    caches = pattern.count(ATTENTION) if job.sleep.eviction == "sliding" else 0
    return job.micro_batch_size * (pattern.count(GATED_DELTA_NET) * state + caches * cache)


def segment_activations(job: Job, blocks: range, segment: Segment) -> int:
    """Bytes that autograd keeps of one segment's forward pass over `blocks`: an estimate, see `_block_activations`."""
    ran = [block for block in blocks if segment.flops[block]]
    per_token = sum(_block_activations(job, job.model.pattern[block]) for block in ran)
    if segment.predicts and blocks.stop == job.model.num_layers:
        # the final norm; logits, their float32 softmax and its gradient
        per_token += 3 * job.model.hidden_size * job.bytes_per_number / job.sequence_shards
        per_token += job.model.vocab_size / job.parallel.tensor * (job.bytes_per_number + 2 * FP32)
    return int(per_token * segment.tokens * job.micro_batch_size)


def _block_activations(job: Job, kind: str) -> float:
    """Bytes per token that autograd keeps of one block.

    In fp32 counted from what torch keeps on a CPU (the tests measure it), in bf16 from FLA's source and not measured:
    chunks of 64, keeps q, k, v, g, beta, o and a 64 x 64 matrix a chunk, computes the rest again.
    """
    model, size, tensor = job.model, job.bytes_per_number, job.parallel.tensor
    width, heads, d_k, d_v = model.hidden_size, model.gdn_heads, model.gdn_key_dim, model.gdn_value_dim
    residual = 6 * width * size / job.sequence_shards  # both norms' inputs, normed values and outputs
    mlp = 5 * model.ffn_hidden_size * size / tensor
    if kind != GATED_DELTA_NET:  # q, k, v, the rotated q and k, the output; the log-sum of each head's scores
        numbers = 6 if job.sleep.eviction == "hard" else 10  # ... and keys and values joined to the cached ones
        return residual + mlp + (numbers * width * size + model.num_attention_heads * FP32) / tensor
    projected = (2 * d_k + 2 * d_v + 2) + 2 * (2 * d_k + d_v)  # projection, before and after SiLU
    if size == FP32:
        chunk = -(-model.window // -(-model.window // 32))
        rule = (d_k + d_v) + 6 * chunk + 8 * d_k + d_v + d_k * d_v / chunk + 11
        head = FP32 * (projected + rule + 5 * d_v)
    else:
        head = size * (projected + (2 * d_k + d_v) + 2 * d_k + FLA_CHUNK + 5 * d_v) + 11 * FP32
    return residual + mlp + head * heads / tensor


def step_flops(job: Job, segments: list[Segment]) -> int:
    """FLOPs of one optimizer step over all ranks: forward, twice that backward, once more where it is recomputed."""
    total = 0
    for segment in segments:
        flops = sum(segment.flops) + (head_flops(job.model) if segment.predicts else 0)
        total += flops * segment.tokens * (_backward_factor(job, segment) + 1)
    return total * job.train.global_batch_size


def fits(memory: Memory, limit: int) -> bool:
    """Whether a rank's bytes leave the reserve free."""
    return memory.total <= (1 - RESERVE) * limit


@dataclass(frozen=True)
class Suggestion:
    """One layout for a number of devices."""

    data: int
    tensor: int
    pipeline: int
    sequence_parallel: bool
    zero_stage: int
    micro_batch_size: int
    micro_batches: int
    bubble: float
    efficiency: float  # estimate: useful part of the devices' time
    bytes: int  # of the fullest rank
    fits: bool | None

    def overrides(self) -> str:
        """As `key=value` for the command line."""
        return (
            f"parallel.data={self.data} parallel.tensor={self.tensor} parallel.pipeline={self.pipeline} "
            f"parallel.sequence={str(self.sequence_parallel).lower()} zero.stage={self.zero_stage} "
            f"train.micro_batch_size={self.micro_batch_size}"
        )


def suggest(
    recipe: Any, devices: int, predicts: Sequence[bool] | None = None, memory_limit: int | None = None
) -> list[Suggestion]:
    """Layouts for `devices` ranks, best first: those that fit before those that do not, then by estimated efficiency.

    For each grid of processes and ZeRO stage the best micro-batch size is kept.

    Raises:
        PlanError: if no layout can run.
    """
    job = Job.of(recipe)
    best: dict[tuple[int, int, int, int], Suggestion] = {}
    for candidate in _candidates(job, devices):
        try:
            check_layout(candidate)
            suggestion = _suggestion(candidate, cut(candidate, predicts), memory_limit)
        except (PlanError, LayoutError, ScheduleError):
            continue
        place = (suggestion.data, suggestion.tensor, suggestion.pipeline, suggestion.zero_stage)
        if place not in best or _rank(suggestion) > _rank(best[place]):
            best[place] = suggestion
    if not best:
        raise PlanError(
            f"no layout of {devices} devices fits train.global_batch_size={job.train.global_batch_size}, the heads and the "
            f"{job.model.num_layers} blocks of the model: write another --devices or a batch that more devices divide"
        )
    return sorted(best.values(), key=_rank, reverse=True)


def _rank(suggestion: Suggestion) -> tuple:
    """Fits, then efficient, then small, then simple."""
    fits = suggestion.fits is not False
    simple = (-suggestion.pipeline, -suggestion.tensor, -suggestion.zero_stage)
    if not fits:  # the nearest to fitting
        return (fits, -suggestion.bytes, suggestion.efficiency, *simple)
    return (fits, round(suggestion.efficiency, 3), -suggestion.bytes, *simple)


def _candidates(job: Job, devices: int) -> Iterator[Job]:
    for tensor in _divisors(devices, most=NODE):
        for pipeline in _divisors(devices // tensor, most=job.model.num_layers):
            data = devices // tensor // pipeline
            if job.train.global_batch_size % data:
                continue
            share = job.train.global_batch_size // data
            for micro_batch_size in _divisors(share):
                if share // micro_batch_size > MOST_MICRO_BATCHES:
                    continue
                for zero_stage in (1,) if pipeline > 1 or data == 1 else (1, 3):
                    for sequence in (False,) if tensor == 1 else (True, False):
                        changes = {"data": data, "tensor": tensor, "pipeline": pipeline, "sequence": sequence}
                        yield dataclasses.replace(
                            job,
                            parallel=job.parallel.model_copy(update={**changes, "pipeline_layout": None}),
                            train=job.train.model_copy(update={"micro_batch_size": micro_batch_size}),
                            zero=job.zero.model_copy(update={"stage": zero_stage}),
                        )


def _suggestion(job: Job, segments: list[Segment], memory_limit: int | None) -> Suggestion:
    costs = _costs(job, segments)
    stages = split_layers(job.model.pattern, job.parallel.pipeline, None, costs)
    memories = [stage_memory(job, blocks, segments, stage) for stage, blocks in enumerate(stages)]
    work = [_work(job.model, costs, blocks) for blocks in stages]
    waiting = bubble(job.parallel.pipeline, job.micro_batches, len(segments))
    full = sum(s.tokens for s in segments) / len(segments) * job.micro_batch_size
    return Suggestion(
        data=job.parallel.data,
        tensor=job.parallel.tensor,
        pipeline=job.parallel.pipeline,
        sequence_parallel=job.parallel.sequence,
        zero_stage=job.zero.stage,
        micro_batch_size=job.micro_batch_size,
        micro_batches=job.micro_batches,
        bubble=waiting,
        efficiency=(1 - waiting)
        * (sum(work) / len(work) / max(work))
        * (full / (full + SATURATION))
        / (1 + communication(job, segments, stages)),
        bytes=max(memory.total for memory in memories),
        fits=None if memory_limit is None else all(fits(memory, memory_limit) for memory in memories),
    )


def suggestions_json(suggestions: Sequence[Suggestion]) -> str:
    """All suggestions, best first, with the overrides that choose each."""
    return json.dumps([{**dataclasses.asdict(s), "overrides": s.overrides()} for s in suggestions], indent=2)


def suggestions_text(suggestions: Sequence[Suggestion], devices: int, most: int = 10) -> str:
    """The best of `suggest` as a table of 80 columns."""
    head = f"{'data':>5} {'tensor':>6} {'pipe':>4} {'seq.p.':>6} {'ZeRO':>4} {'micro-batches':>14} {'bubble':>7} "
    lines = [f"{devices} devices, best first; efficiency is an estimate to compare layouts by", ""]
    lines.append(head + f"{'efficiency':>10} {'memory':>8}  fits")
    for s in suggestions[:most]:
        micro = f"{s.micro_batches} of {s.micro_batch_size}"
        fit = {None: "", True: "yes", False: "NO"}[s.fits]
        lines.append(
            f"{s.data:>5} {s.tensor:>6} {s.pipeline:>4} {'yes' if s.sequence_parallel else '-':>6} {s.zero_stage:>4} "
            f"{micro:>14} {s.bubble:>7.1%} {s.efficiency:>10.1%} {_bytes(s.bytes):>8}  {fit}".rstrip()
        )
    words = suggestions[0].overrides().split()
    return "\n".join([*lines, "", "the first: " + " ".join(words[:3]), "           " + " ".join(words[3:])])


def communication(job: Job, segments: list[Segment], stages: list[range]) -> float:
    """Estimated time a rank spends sending in a step, as a fraction of the time it computes; nothing overlaps.

    Tensor parallelism: two all-reduces (or gather and scatter pairs) a block forward, two backward, two recomputed,
    inside a node. Pipeline: a hidden state forward and back a segment, between nodes. Data: gradients reduced and weights
    gathered once a step, between nodes; ZeRO 3 gathers the weights forward, recomputed and backward of every segment.
    """
    parallel, size, width = job.parallel, job.bytes_per_number, job.model.hidden_size
    tokens = sum(segment.tokens for segment in segments) * job.sequences_per_rank  # a rank passes over in a step
    blocks = max(map(len, stages))
    rounds = 4 + 2 * job.train.recompute
    ring = 2 * (parallel.tensor - 1) / parallel.tensor
    in_node = ring * rounds * blocks * tokens * width * size
    between = 2 * tokens * width * size / job.sequence_shards if parallel.pipeline > 1 else 0
    weights = max(sum(w.size(parallel.tensor) for w in parameters(job.model, job.sleep, stage)) for stage in stages)
    others = (parallel.data - 1) / parallel.data
    between += others * weights * (FP32 + size)
    if job.zero.stage == 3:
        between += others * weights * size * (2 + job.train.recompute) * len(segments) * job.micro_batches
    per_device = step_flops(job, segments) / (parallel.data * parallel.tensor * parallel.pipeline)
    small = parallel.data * parallel.tensor * parallel.pipeline <= NODE
    rate = FLOPS_PER_BYTE_IN_NODE if small else FLOPS_PER_BYTE_BETWEEN_NODES
    return (in_node * FLOPS_PER_BYTE_IN_NODE + between * rate) / per_device


def _costs(job: Job, segments: list[Segment]):
    slept = len({s.window for s in segments if not s.predicts})
    read = sum(s.predicts for s in segments)
    return sequence_costs(job.model, job.passes, sleep=job.sleep, consolidated=slept, predicted=read)


def _work(model: ModelConfig, costs: Any, blocks: range) -> int:
    ends = costs.embedding * (blocks.start == 0) + costs.head * (blocks.stop == model.num_layers)
    return sum(costs.blocks[blocks.start : blocks.stop]) + ends


def _backward_factor(job: Job, segment: Segment) -> int:
    """Time of a segment's backward step in forward steps."""
    return (2 + job.train.recompute) if segment.with_grad else 0


def _step_times(job: Job, segments: list[Segment], stages: list[range]) -> tuple[list[list[float]], list[list[float]]]:
    """FLOPs of a forward and a backward step, [stages][segments], for one sequence on one rank."""
    forward = []
    for blocks in stages:
        forward.append([])
        for segment in segments:
            flops = sum(segment.flops[blocks.start : blocks.stop])
            flops += embedding_flops(job.model) if blocks.start == 0 else 0
            flops += head_flops(job.model) if segment.predicts and blocks.stop == job.model.num_layers else 0
            forward[-1].append(float(flops * segment.tokens))
    backward = [
        [time * _backward_factor(job, segment) for time, segment in zip(times, segments, strict=True)]
        for times in forward
    ]
    return forward, backward


def _notes(job: Job) -> list[str]:
    notes = []
    if len(job.sleep.pass_choices) > 1:
        notes.append(f"N is drawn from {job.sleep.pass_choices}: all numbers are for N={job.passes}")
    if job.zero.stage >= 2:
        notes.append("ZeRO 2 and 3 hold a micro-batch's gradients whole: every segment adds to all of them")
    return notes


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [d for d in range(1, min(number, most or number) + 1) if number % d == 0]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _letters(pattern: str, most: int) -> str:
    """A pattern, or how many of each letter where it is too long."""
    if len(pattern) <= most:
        return pattern
    return " ".join(f"{pattern.count(kind)}{kind}" for kind in sorted(set(pattern)))


def _count(number: float) -> str:
    return _scaled(number, ("", "k", "M", "G", "T", "P", "E"))


def _bytes(number: float) -> str:
    return _scaled(number, (" B", " kB", " MB", " GB", " TB", " PB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    """Three digits and a decimal unit."""
    power = 0
    while number >= 999.5 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    digits = 0 if power == 0 or number >= 99.95 else 1
    return f"{number:.{digits}f}{units[power]}"
