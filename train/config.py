"""The fields of a recipe and the checks between them; recipe_file.py reads them from files.

Nothing here imports torch.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.parameters import matches, parameters
from powernap.model.plugins import offered_by
from powernap.model.recompute import Recompute, keeps_activations
from powernap.model.section import Section
from powernap.parallel.planning.layout import format_layout, sequence_costs, split_layers
from powernap.train import by_step
from powernap.train.distillation import DistillationConfig, check_context, teacher_recipe
from powernap.train.paths import CACHE, CachePath, PathError, Shards, SharedPath, cache_folder

MOST_SEGMENTS = 2**16  # per sequence: windows times passes


def _one_of(built_in: list[str], group: str, name: str) -> str:
    """`name`, if it is built in or an entry point of `powernap.<group>`; else raises ValueError."""
    if name in built_in and name in offered_by(group):
        raise ValueError(
            f"{name} is built in, and an installed package has {group} of that name: rename its entry point"
        )
    if name in built_in or name in offered_by(group):
        return name
    raise ValueError(f"no {group[:-1]} '{name}': installed are {', '.join([*built_in, *offered_by(group)])}")


class RunSection(Section):
    """Where a run is stored and tracked, and its seed."""

    name: str = Field(
        pattern=r"^[\w][\w.\-]*$",
        max_length=60,  # a file name has at most 255 bytes, a letter up to four
        description="the run's folder below run.root: letters, digits, . _ -",
    )
    # MLflow's database is stored there, and ? and % have a meaning of their own in its URL.
    root: SharedPath = Field("runs", pattern=r"^[^?%]+$", description="folder that holds all runs, without ? and %")
    experiment: str = Field("powernap", min_length=1, max_length=500, description="MLflow experiment")
    sweep: str | None = Field(
        None,
        min_length=1,
        max_length=60,
        description="the sweep that the run is part of: MLflow shows its runs below one. `submit` sets it",
    )
    trackers: list[str] = Field(
        ["mlflow"], description="where metrics go beside metrics.jsonl: mlflow, or trackers of installed packages"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seeds weights, data order and the drawing of N")

    @field_validator("trackers")
    @classmethod
    def _are_installed(cls, trackers: list[str]) -> list[str]:
        return [_one_of(["mlflow"], "trackers", name) for name in trackers]


class DatasetConfig(Section):
    """One dataset of a mixture; shards alone have weight 1."""

    shards: Shards | list[Shards] = Field(description="path, glob, brace list or URL, or a list of them")
    weight: float = Field(
        1.0,
        gt=0,
        description="its share of the sequences read, relative to the other datasets; one that ends begins anew",
    )


class DataConfig(Section):
    """Token shards: WebDataset tars with tokens, loss mask and answers (see `powernap data build`)."""

    train: Shards | list[Shards] | dict[str, DatasetConfig] = Field(
        description="shards to train on: path, glob, brace list or URL, or a list of them; or a mixture, in quotes on a command "
        "line: '{web: {shards: web-*.tar, weight: 3}, depo: depo-*.tar}'; without a weight it is 1"
    )
    test: Shards | list[Shards] | dict[str, Shards | list[Shards]] | None = Field(
        None,
        description="held-out shards for the loss and the accuracy by depth; null: none. The entries of a list after the first may "
        "hold sequences of other lengths, which are reported apart. Several sets by name, such as {web: web/test-*.tar, books: "
        "books/test-*.tar}, are reported apart, too; the first is the run's own",
    )
    sequence_length: int = Field(
        ge=2, description="T, tokens in every sequence: documents are cut to it, stored sequences must have it"
    )
    documents: Literal["packed", "separate", "whole"] = Field(
        "packed",
        description="how shards of documents are cut. packed: one after the other; separate: several to a sequence, each from a window "
        "on and as if it were alone; whole: each into sequences of its own, the last one padded, for sleep.carry. Stored sequences "
        "stay as they are",
    )
    workers: int = Field(0, ge=0, description="reader processes per data-parallel rank; 0: the trainer reads itself")
    shuffle_buffer: int = Field(2000, ge=1, description="samples of a shard that are mixed; 1: a shard keeps its order")
    lanes: int | None = Field(
        None, ge=1, description="shards read side by side, by all ranks together; null: all, at most 64"
    )
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="a sample or shard that cannot be used: stop, or train without it"
    )
    skip_budget: int = Field(100, ge=0, description="with on_error=skip: samples and shards a run may do without")
    cache: CachePath = Field(
        CACHE,
        min_length=1,
        description="folder for remote shards, taken for unchanged while there, and indexes; the default is a folder among "
        "temporary files where there is no HOME",
    )
    cache_limit_gb: float | None = Field(
        None, gt=0, le=1e9, description="most of remote shards to keep there; null: all"
    )
    retries: int = Field(
        4,
        ge=0,
        description="how often fetching a remote shard is tried again: after 2 s, 4 s, ..., or when the server asks",
    )
    timeout_seconds: float = Field(
        60,
        gt=0,
        le=1e6,
        description="seconds without data from a remote shard's server or command, after which it is tried again",
    )

    @field_validator("train", mode="before")
    @classmethod
    def _shards_alone(cls, train: object) -> object:
        if not isinstance(train, dict):
            return train
        return {name: {"shards": given} if isinstance(given, str | list) else given for name, given in train.items()}

    @field_validator("train")
    @classmethod
    def _some_dataset(cls, train: object) -> object:
        if train == {}:
            raise ValueError("an empty mixture: name at least one dataset")
        return train

    @field_validator("test")
    @classmethod
    def _some_test_set(cls, test: object) -> object:
        if isinstance(test, dict):
            if not test:
                raise ValueError("no test set: name at least one, or write null")
            for name in test:
                if not re.fullmatch(r"[\w.-]+", name):
                    raise ValueError(f"'{name}' becomes part of a metric's name: write letters, digits, _ . -")
        return test

    @property
    def datasets(self) -> dict[str, tuple[str | list[str], float]]:
        """name -> shards, weight; a single dataset has an empty name."""
        if isinstance(self.train, dict):
            return {name: (dataset.shards, dataset.weight) for name, dataset in self.train.items()}
        return {"": (self.train, 1.0)}

    @property
    def shard_lists(self) -> dict[str, str | list[str]]:
        """Recipe field -> its list of shards."""
        lists = {f"data.train.{name}" if name else "data.train": shards for name, (shards, _) in self.datasets.items()}
        return lists | {f"data.test.{name}" if name else "data.test": shards for name, shards in self.tests.items()}

    @property
    def tests(self) -> dict[str, str | list[str]]:
        """name -> test shards; a single set has an empty name."""
        if isinstance(self.test, dict):
            return dict(self.test)
        return {} if self.test is None else {"": self.test}

    @property
    def cache_folder(self) -> Path:
        try:
            return cache_folder(self.cache)
        except PathError as error:  # although the check on the submitting machine passed
            raise PathError(f"data.cache={self.cache}: {error}") from None

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_limit_gb is None else round(self.cache_limit_gb * 1e9)


Patterns = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]


class TrainConfig(Section):
    """The training loop."""

    steps: int = Field(ge=1, description="optimizer steps; or the tokens to read, such as 2B tokens")
    global_batch_size: int = Field(ge=1, le=2**20, description="sequences per optimizer step, over all ranks")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences per forward pass; null: all of a rank, in a pipeline one part a stage"
    )
    start_from: SharedPath | None = Field(
        None,
        min_length=1,
        description="weights to start from, in any layout: a run, by its name or folder, one of its checkpoints, an exported "
        "model, or a model in Hugging Face's format; null: drawn weights",
    )
    insert: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        min_length=1,
        description="blocks of model.pattern, from 0, that stand between those of start_from: their output projections start at "
        "zero, so that they change nothing at first",
    )
    start_optimizer: bool = Field(False, description="with start_from: its optimizer states, too")
    branch_from: SharedPath | None = Field(
        None,
        min_length=1,
        description="a run, or one of its checkpoints, that this new run continues as --resume would: with its step, optimizer "
        "states and place in the data, such as another decay of the learning rate from one plateau",
    )
    freeze: Patterns | None = Field(
        None,
        description="weights that stay as they are: names of parameters or modules, such as [embedding, decoder.layers.[0-3].mlp], "
        "* for any text; they have no gradient and no optimizer state",
    )
    only: Patterns | None = Field(None, description="the weights that are trained, in place of freeze, written like it")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="weights and activations; accumulation is fp32")
    recompute: Recompute = Field(
        "segment",
        description="what is computed again going backward, in place of being kept: none; selective, all but projections and "
        "attention; blocks, from each block's inputs; segment, a window's pass from its inputs; nested, that, block by block",
    )
    offload_inputs: bool = Field(
        False, description="keep the inputs that recomputation starts from in host memory until they are needed"
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of what each mixer and MLP adds to the residual stream that becomes zero in training, for small data",
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        description="times the squared log of the softmax's sum, added to each loss token's loss (arXiv 2204.02311); 0: off",
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep a running mean of the weights, of which each step keeps this share; checkpoint export --ema writes it",
    )
    gradient_noise: bool = Field(
        False,
        description="log the gradient noise scale in sequences (arXiv 1812.06162); needs parallel.data of 2 or more",
    )
    compile: bool = Field(
        False, description="torch.compile of norms, SwiGLU and rotation: fewer kernels, for a minute at the start"
    )
    log_every: int = Field(10, ge=1, description="steps between log lines, health metrics and tracking")
    skip_budget: int = Field(
        10, ge=0, description="steps a run may skip because loss or gradient is not finite; with one more it stops"
    )
    spike_factor: float | None = Field(
        10.0, gt=1, description="a norm this many times its recent median is logged with its layers; null: never"
    )
    deterministic: bool = Field(False, description="the same bits in every run, from slower kernels where need be")

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained; name: in the whole model."""
        if self.only is not None:
            return any(matches(name, pattern) for pattern in self.only)
        return not any(matches(name, pattern) for pattern in self.freeze or ())

    @model_validator(mode="after")
    def _one_of_freeze_and_only(self) -> Self:
        if self.freeze is not None and self.only is not None:
            raise ValueError("freeze and only are both given: write what stays as it is, or what is trained")
        return self

    @field_validator("recompute", mode="before")
    @classmethod
    def _was_a_switch(cls, value: object) -> object:
        """Recipes, runs and checkpoints of before say true or false."""
        return {"true": "segment", "false": "none"}.get(str(value).lower(), value)

    @model_validator(mode="after")
    def _inputs_are_kept(self) -> Self:
        if self.offload_inputs and keeps_activations(self.recompute):
            raise ValueError(
                f"offload_inputs=true moves inputs alone, recompute={self.recompute} keeps much else: write "
                "train.recompute=segment, nested or blocks"
            )
        return self

    @model_validator(mode="after")
    def _states_have_a_source(self) -> Self:
        if self.insert is not None and self.start_from is None:
            raise ValueError(f"insert={self.insert}: write train.start_from, whose blocks they stand between")
        if self.branch_from is not None and self.start_from is not None:
            raise ValueError(
                "branch_from and start_from are both given: branch_from continues a run, start_from begins with its weights"
            )
        if self.start_optimizer and self.start_from is None:
            raise ValueError(
                "start_optimizer=true: write train.start_from, the run whose optimizer states to start from"
            )
        return self


class CheckpointConfig(Section):
    """How often checkpoints are written, and which are kept."""

    every: int = Field(500, ge=1, description="steps between checkpoints; there is one at the end as well")
    keep_last: int = Field(3, ge=1, description="the newest checkpoints, kept; older ones are deleted")
    keep_every: int | None = Field(None, ge=1, description="checkpoints of steps that this divides stay; null: none")
    asynchronous: bool = Field(
        True,
        description="train on while files are written; takes a copy of weights and optimizer states in host memory",
    )


def _pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value  # YAML has no tuples


def _moments_decay(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError("both must lie in [0, 1)")
    return betas


Betas = Annotated[tuple[float, float], BeforeValidator(_pair), AfterValidator(_moments_decay)]


class GroupConfig(Section):
    """What some of the parameters are trained with; null: as the others of their kind."""

    lr: float | None = Field(None, ge=0, description="peak learning rate, Muon's for matrices that it trains")
    weight_decay: float | None = Field(None, ge=0, description="decoupled weight decay, of all of them")
    betas: Betas | None = Field(None, description="AdamW's decay of both moments")


class OptimizerConfig(Section):
    """AdamW; Muon for matrices inside the blocks with AdamW for the rest; or another package's optimizer."""

    name: str = Field(
        "adamw", description="adamw, muon for matrices (arXiv 2605.26099), or an installed package's optimizer"
    )
    lr: float = Field(1e-3, gt=0, description="AdamW's peak learning rate")
    betas: Betas = Field((0.9, 0.98), description="AdamW's decay of both moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, on matrices only")
    groups: dict[str, GroupConfig] = Field(
        {},
        description="settings of their own for some parameters, by patterns like those of train.freeze, such as "
        "{embedding: {lr: 1.0e-4, weight_decay: 0.0}}",
    )
    clip: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    muon_lr: float = Field(2e-3, gt=0, description="Muon's peak learning rate")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum")
    muon_split: bool = Field(
        False,
        description="Muon takes each projection of a joined matrix, such as q, k and v, or gate and up, as a matrix of its own",
    )
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up; or tokens, such as 50M tokens")
    schedule: str = Field(
        "wsd",
        description="learning rate after the warm-up: wsd (constant, then a decay), cosine, linear, inverse_sqrt, or an installed "
        "package's schedule",
    )
    hold: float = Field(0.6, ge=0, le=1, description="of wsd: fraction of all steps before the decay")
    decay: Literal["linear", "sqrt"] = Field(
        "linear", description="of wsd: linear, or one minus the root of the part that is done (arXiv 2405.18392)"
    )
    final_lr: float = Field(0.02, ge=0, le=1, description="where the decay ends, as a fraction of the peak")

    @field_validator("name", "schedule")
    @classmethod
    def _is_installed(cls, name: str, info: ValidationInfo) -> str:
        group, built_in = {
            "name": ("optimizers", ["adamw", "muon"]),
            "schedule": ("schedules", ["wsd", "cosine", "linear", "inverse_sqrt"]),
        }[info.field_name or ""]
        return _one_of(built_in, group, name)


class ParallelConfig(Section):
    """How many processes share the work, and how."""

    data: int = Field(1, ge=1, description="data-parallel ranks")
    tensor: int = Field(
        1,
        ge=1,
        description="tensor-parallel ranks: heads, MLP and vocabulary, padded where need be, are split over them",
    )
    sequence: bool = Field(False, description="split norms and residuals along the tokens over the tensor ranks too")
    pipeline: int = Field(1, ge=1, description="pipeline stages")
    pipeline_layout: str | None = Field(
        None, min_length=1, description="blocks of each stage, such as AG|GAG|AG; null: balanced by cost"
    )
    timeout_seconds: float = Field(600, gt=0, description="how long a rank waits for another before it gives up")

    @property
    def grid(self) -> str:
        return f"parallel.data={self.data} x tensor={self.tensor} x pipeline={self.pipeline}"

    @property
    def world_size(self) -> int:
        return self.data * self.tensor * self.pipeline


class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: int = Field(
        1, ge=0, le=3, description="split over data ranks: 1 optimizer state, 2 and gradients, 3 and parameters"
    )
    offload: bool = Field(False, description="keep the optimizer state in host memory and step there")


class EvaluationConfig(Section):
    """Accuracy by depth on the test shards during training."""

    every: int | None = Field(None, ge=1, description="steps between evaluations; null: at the end only")
    passes: list[int] | None = Field(None, min_length=1, description="values of N to read at; null: the trained ones")
    samples: int = Field(512, ge=1, description="test samples per evaluation")

    @field_validator("passes")
    @classmethod
    def _at_least_one(cls, passes: list[int] | None) -> list[int] | None:
        if passes and min(passes) < 1:
            raise ValueError("every N must be at least 1")
        return passes


class Recipe(Section):
    """A whole run.

    Fields of by_step.FIELDS may change over the steps: they hold the last value, with which the trained model is read; `at` has
    the recipe of a step.
    """

    run: RunSection
    model: ModelConfig
    sleep: SleepConfig = SleepConfig()
    data: DataConfig
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distillation: DistillationConfig = DistillationConfig()

    _schedule: by_step.Schedule = PrivateAttr({})
    _phases: list[tuple[int, "Recipe"]] = PrivateAttr([])

    @model_validator(mode="wrap")
    @classmethod
    def _by_step(cls, values: object, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        if not isinstance(values, dict):
            return handler(values)
        plain, schedule = by_step.taken_out(values)
        recipe = handler(plain)
        if schedule:
            recipe._schedule = schedule
            recipe._phases = [(start, recipe._phase(plain, start, info.context)) for start in by_step.starts(schedule)]
        return recipe

    def _phase(self, values: dict[str, Any], start: int, context: Any) -> "Recipe":
        """The recipe of the steps after `start`, with this one's pipeline stages. Raises ValueError in one line."""
        for field, values_by_step in self._schedule.items():
            values = by_step.replaced(values, field, by_step.value_after(values_by_step, start))
        if self.parallel.pipeline > 1:
            layout = format_layout(self.model.pattern, self.stage_blocks)
            values = {**values, "parallel": self.parallel.model_copy(update={"pipeline_layout": layout})}
        try:
            return Recipe.model_validate(values, context=context)
        except ValidationError as error:
            finding = error.errors()[0]
            field = ".".join(map(str, finding["loc"][:2]))
            message = finding["msg"].removeprefix("Value error, ")
            raise ValueError(f"after {start} steps: {field + ': ' if field else ''}{message}") from None

    @model_serializer(mode="wrap")
    def _with_schedule(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return by_step.put_back(handler(self), self._schedule)

    @property
    def phases(self) -> list[tuple[int, "Recipe"]]:
        """(steps done before it, the recipe of its steps) of each part of the run in which nothing changes."""
        return self._phases or [(0, self)]

    def at(self, step: int) -> "Recipe":
        """The recipe of a step, counted from 1."""
        return [recipe for start, recipe in self.phases if start < step][-1]

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        self.sleep.check_against(self.model)
        train, parallel = self.train, self.parallel
        if self.windows * max(self.sleep.pass_choices) > MOST_SEGMENTS:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} is {self.windows} windows of model.window="
                f"{self.model.window}: with sleep.passes={self.sleep.passes} more than {MOST_SEGMENTS} segments"
            )
        if train.global_batch_size % parallel.data:
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} must be a multiple of parallel.data={parallel.data}"
            )
        share = train.global_batch_size // parallel.data
        if train.micro_batch_size and share % train.micro_batch_size:
            raise ValueError(
                f"train.micro_batch_size={train.micro_batch_size} must divide the {share} sequences of a rank "
                f"(train.global_batch_size / parallel.data)"
            )
        self._tensor_parallel_fits()
        self._pipeline_fits()
        self._zero_fits()
        self._documents_fit()
        self._carry_fits()
        self._patterns_fit()
        self._insertion_fits()
        check_context(self)
        if train.gradient_noise and parallel.data == 1:
            raise ValueError(
                "train.gradient_noise=true compares the gradients of data ranks: write parallel.data=2 or more"
            )
        if self.optimizer.warmup_steps > train.steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must not exceed train.steps={train.steps}"
            )
        return self

    def _tensor_parallel_fits(self) -> None:
        tensor, model = self.parallel.tensor, self.model
        sizes = {f"{part.section}.{field}": size for part in model.parts for field, size in part.split_sizes().items()}
        for field, size in sizes.items():
            if size % tensor:
                raise ValueError(
                    f"model.{field}={size} must be a multiple of parallel.tensor={tensor}: "
                    f"{-(-size // tensor) * tensor} would be"
                )
        if not self.parallel.sequence:
            return
        if model.window % tensor:
            raise ValueError(
                f"parallel.sequence=true splits windows over tensor ranks: model.window={model.window} must be a multiple "
                f"of parallel.tensor={tensor}; {-(-model.window // tensor) * tensor} would be, or parallel.sequence=false"
            )

    def _pipeline_fits(self) -> None:
        parallel, stages = self.parallel, self.parallel.pipeline
        if stages > self.model.num_layers:
            raise ValueError(
                f"parallel.pipeline={stages} exceeds the {self.model.num_layers} blocks of model.pattern="
                f"{self.model.pattern}: use at most {self.model.num_layers}"
            )
        assert self.stage_blocks  # raises LayoutError
        if stages == 1:
            return
        share = self.sequences_per_rank
        if self.train.micro_batch_size is None and share % stages:
            raise ValueError(
                f"the {share} sequences of a rank (train.global_batch_size / parallel.data) do not make "
                f"parallel.pipeline={stages} micro-batches: train.global_batch_size="
                f"{-(-share // stages) * stages * parallel.data} would"
            )
        micro_batches = share // self.micro_batch_size
        if micro_batches < stages or micro_batches % stages:
            raise ValueError(
                f"train.micro_batch_size={self.micro_batch_size} makes {micro_batches} micro-batches of the {share} "
                f"sequences of a rank: a pipeline of {stages} stages needs a multiple of {stages}"
                + self._fitting_micro_batch(share, stages)
            )

    def _fitting_micro_batch(self, share: int, stages: int) -> str:
        fitting = [size for size in range(1, share + 1) if share % (size * stages) == 0]
        if not fitting:
            return f"; train.global_batch_size={-(-share // stages) * stages * self.parallel.data} allows it"
        return f"; {max(fitting)} would do" if len(fitting) == 1 else f"; {', '.join(map(str, fitting))} would do"

    def _zero_fits(self) -> None:
        stage, parallel = self.zero.stage, self.parallel
        if stage == 0:
            raise ValueError("zero.stage=0 has no gradient norm to clip or log: use 1, which costs nothing more")
        if stage == 2 and parallel.pipeline > 1:
            raise ValueError(
                f"zero.stage=2 with parallel.pipeline={parallel.pipeline} saves no memory: every segment adds to the "
                "gradient of every weight, so whole gradients are alive; use zero.stage=1, or parallel.pipeline=1"
            )
        if stage == 3 and parallel.pipeline > 1:
            raise ValueError(
                f"zero.stage=3 with parallel.pipeline={parallel.pipeline}: DeepSpeed gathers parameters where the "
                "stages of a pipeline would wait for each other; use zero.stage=1, or parallel.pipeline=1"
            )
        if stage == 3 and self.train.recompute == "selective":
            raise ValueError(
                "train.recompute=selective with zero.stage=3: weights are not gathered at the same places forward and "
                "backward, so what is kept cannot be distinguished from what is not; use train.recompute=blocks or zero.stage=1"
            )
        if stage == 3 and self.optimizer.name == "muon":
            raise ValueError(
                "zero.stage=3 with optimizer.name=muon: every data rank has a part of every matrix, Muon needs whole ones; use "
                "zero.stage=2 or optimizer.name=adamw"
            )

    def _documents_fit(self) -> None:
        if self.data.documents != "separate":
            return
        inputs, window = self.data.sequence_length - 1, self.model.window
        if inputs % window:
            raise ValueError(
                f"data.documents=separate: each begins at a window, so data.sequence_length={inputs + 1} must be one more than a "
                f"multiple of model.window={window}, such as {-(-inputs // window) * window + 1}"
            )
        if self.sleep.carry:
            raise ValueError(
                "sleep.carry=true with data.documents=separate: what a sequence leaves is of several documents: use "
                "data.documents=whole"
            )

    def _carry_fits(self) -> None:
        if not self.sleep.carry:
            return
        batch, inputs, window = self.train.global_batch_size, self.data.sequence_length - 1, self.model.window
        if self.data.lanes != batch:
            raise ValueError(
                f"sleep.carry=true: each of the {batch} sequences of a step continues a lane of its own: write "
                f"data.lanes={batch}"
            )
        if inputs % window:
            raise ValueError(
                f"sleep.carry=true: data.sequence_length={inputs + 1} cuts a document inside a window: write one more than "
                f"a multiple of model.window={window}, such as {-(-inputs // window) * window + 1}"
            )
        if isinstance(self.data.train, dict):
            raise ValueError("sleep.carry=true reads one dataset, data.train is a mixture: build them into one folder")
        if self.data.on_error == "skip":
            raise ValueError(
                "sleep.carry=true with data.on_error=skip would continue behind a hole: use data.on_error=stop"
            )

    def _patterns_fit(self) -> None:
        train, groups = self.train, self.optimizer.groups
        if not (train.freeze or train.only or groups):
            return
        weights = parameters(self.model, self.sleep, range(self.model.num_layers))
        names = [weight.name for weight in weights]
        for field, patterns in (("train.freeze", train.freeze), ("train.only", train.only)):
            if patterns:
                matched = _matched(names, field, patterns)
                if len(matched) == len(names):
                    what = "nothing is left to train" if field == "train.freeze" else "write null, which trains all"
                    raise ValueError(f"{field}={patterns} matches all {len(names)} parameters: {what}")
        owner: dict[str, str] = {}
        for pattern in groups:
            for name in _matched([name for name in names if train.trains(name)], "optimizer.groups", [pattern]):
                if owner.setdefault(name, pattern) != pattern:
                    raise ValueError(f"optimizer.groups: {name} is in two groups, {owner[name]} and {pattern}")

    def _insertion_fits(self) -> None:
        inserted, model = self.train.insert or [], self.model
        given = f"train.insert={inserted} with model.pattern={model.pattern}"
        if len(set(inserted)) < len(inserted) or (inserted and max(inserted) >= model.num_layers):
            raise ValueError(f"{given}: write each block once, from 0 to {model.num_layers - 1}")
        if len(inserted) == model.num_layers:
            raise ValueError(f"{given}: no block is left that train.start_from could have")
        for block in inserted:
            if not any(weight.split == 1 for weight in model.mixer(block).weights(model)):
                raise ValueError(f"{given}: a {model.mixer(block).title} has no output projection that could be zero")

    @property
    def run_folder(self) -> Path:
        return Path(self.run.root) / self.run.name

    @property
    def windows(self) -> int:
        """Windows per sequence."""
        return -(-(self.data.sequence_length - 1) // self.model.window)

    @property
    def stage_blocks(self) -> list[range]:
        """The blocks of each pipeline stage."""
        parallel, passes = self.parallel, max(self.sleep.pass_choices)
        windows = self.windows
        read = windows if self.sleep.every_window else 1
        costs = sequence_costs(self.model, passes, sleep=self.sleep, consolidated=max(1, windows - 1), predicted=read)
        return split_layers(self.model.pattern, parallel.pipeline, parallel.pipeline_layout, costs)

    @property
    def teacher(self) -> "Recipe | None":
        """Of distillation.teacher, which is looked for each time. Raises RecipeError."""
        return teacher_recipe(self) if self.distillation.teacher else None

    @property
    def sequence_shards(self) -> int:
        """Tensor ranks over which a window's tokens are split between blocks."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def sequences_per_rank(self) -> int:
        """Sequences one data-parallel rank reads for one optimizer step."""
        return self.train.global_batch_size // self.parallel.data

    @property
    def micro_batch_size(self) -> int:
        return self.train.micro_batch_size or max(1, self.sequences_per_rank // self.parallel.pipeline)


def _matched(names: list[str], field: str, patterns: Iterable[str]) -> list[str]:
    """The trained parameters among `names` that a pattern matches. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            modules = {name.rsplit(".", depth)[0] for name in names for depth in range(1, name.count(".") + 1)}
            near = difflib.get_close_matches(pattern, [*names, *sorted(modules)], n=3, cutoff=0.4) or names[:3]
            raise ValueError(f"{field}: {pattern} matches no trained parameter; near names are {', '.join(near)}")
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]
