"""What a model is made of and how it sleeps: the `model` and `sleep` sections of a recipe.

Nothing here imports torch: `powernap --help` and every check of a recipe read these classes.
"""

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, create_model, field_validator, model_validator

from powernap.model.mixers import MIXERS
from powernap.model.mlp import SwiGLU
from powernap.model.part import Mixer, Part
from powernap.model.section import Section

WITH_FAST_WEIGHTS = " or ".join(letter for letter, mixer in MIXERS.items() if mixer.has_fast_weights)


class _ModelConfig(Section):
    """A stack of blocks, each a sequence mixer followed by an MLP. Every mixer has a section of its own beside these fields."""

    pattern: str = Field(
        "AGAG",
        min_length=1,
        max_length=256,
        description="one letter a block: "
        + ", ".join(f"{letter} {kind.title}" for letter, kind in MIXERS.items())
        + "; a small letter: the block has no MLP",
    )
    window: int = Field(ge=1, description="L, tokens per window; the KV cache is evicted after each; or by step")
    vocab_size: int = Field(ge=2, description="tokens are 0 .. vocab_size - 1")
    pad_token_id: int | None = Field(None, ge=0, description="token that must leave no trace in the fast weights")
    hidden_size: int = Field(ge=1, description="width of the residual stream")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of every RMSNorm")
    zero_centred_norms: bool = Field(
        False, description="norms multiply by 1 + weight, as in Qwen3.5; those of a recurrence's output by weight"
    )
    embedding_std: float | None = Field(
        None,
        gt=0,
        description="standard deviation of the embeddings at the start; null: 1, or 0.02 with tie_embeddings",
    )
    tie_embeddings: bool = Field(False, description="use the embedding matrix as the output head")
    mlp: SwiGLU = Field(description="the MLP of every block")

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: object) -> object:
        for old, (section, field) in RENAMED.items():
            if isinstance(values, dict) and old in values:
                raise ValueError(f"{old} is now {section}.{field}")
        return values

    @field_validator("pattern")
    @classmethod
    def _only_known_blocks(cls, pattern: str) -> str:
        if set(pattern.upper()) - MIXERS.keys():
            raise ValueError(f"use only the letters {', '.join(MIXERS)}, small ones for blocks without an MLP")
        return pattern

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        for kind in dict.fromkeys(MIXERS[letter] for letter in self.pattern.upper()):
            if getattr(self, kind.section) is None:
                fields = [name for name, field in kind.model_fields.items() if field.is_required()]
                required = ", ".join(f"{kind.section}.{name}" for name in fields)
                raise ValueError(f"{kind.section} is missing: pattern={self.pattern} needs {required}")
        for part in self.parts:
            part.check(self)
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} must be below vocab_size={self.vocab_size}")
        return self

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    def vocabulary_rows(self, tensor: int) -> int:
        """Rows of the embedding and the head on each of `tensor` ranks. Those after the vocabulary are pads, zero and no token's."""
        return -(-self.vocab_size // tensor)

    @property
    def initial_embedding_std(self) -> float:
        """As GPT-2 has it: with a tied head and 1 the first loss of sizes/125m is 666 nats a token, with 0.02 it is 10.5."""
        return self.embedding_std or (0.02 if self.tie_embeddings else 1.0)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The mixer of each block."""
        return tuple(map(self.mixer, range(self.num_layers)))

    def mixer(self, block: int) -> Mixer:
        return getattr(self, MIXERS[self.pattern[block].upper()].section)

    def has_mlp(self, block: int) -> bool:
        return self.pattern[block].isupper()

    def block_norms(self, block: int) -> tuple[str, ...]:
        """Names of the RMSNorms around the mixer and the MLP of a block, in the order in which they run."""
        before, after = ("input_layernorm", "pre_mlp_layernorm"), ("post_mixer_layernorm", "post_mlp_layernorm")
        where, names = self.mixer(block).norms, []
        for norm_before, norm_after in zip(before, after, strict=True):
            names += [norm_before] * (where != "post") + [norm_after] * (where != "pre")
        return tuple(name for name in names if self.has_mlp(block) or "mlp" not in name)

    def without_blocks(self, blocks: Collection[int]) -> Self:
        """The model with these blocks left out."""
        return self.model_copy(update={"pattern": "".join(x for i, x in enumerate(self.pattern) if i not in blocks)})

    @property
    def parts(self) -> tuple[Part, ...]:
        """The distinct mixers of the blocks, and the MLP."""
        return (*dict.fromkeys(self.mixers), self.mlp)

    @property
    def fast_weight_blocks(self) -> tuple[int, ...]:
        """Blocks with fast weights, counted from 0."""
        return tuple(block for block, mixer in enumerate(self.mixers) if mixer.has_fast_weights)

    @property
    def after_last_write(self) -> int:
        """The first block after the last one with fast weights; 0 if none has any."""
        return self.fast_weight_blocks[-1] + 1 if self.fast_weight_blocks else 0


# Fields that were in `model` itself before each part had its own section.
RENAMED = {
    "ffn_hidden_size": ("mlp", "ffn_hidden_size"),
    "num_attention_heads": ("attention", "heads"),
    "rope_base": ("attention", "rope_base"),
    "gdn_heads": ("gdn", "heads"),
    "gdn_key_dim": ("gdn", "key_dim"),
    "gdn_value_dim": ("gdn", "value_dim"),
    "conv_kernel": ("gdn", "conv_kernel"),
}


def with_sections(model: Any) -> Any:
    """The `model` section of an old checkpoint or export, fields moved to their sections; anything else as it is."""
    if not isinstance(model, dict):
        return model
    moved = {name: value for name, value in model.items() if name not in RENAMED}
    for old, (section, field) in RENAMED.items():
        if old in model:
            moved[section] = {**moved.get(section, {}), field: model[old]}
    return moved


if TYPE_CHECKING:
    ModelConfig = _ModelConfig
else:
    ModelConfig = create_model(
        "ModelConfig",
        __base__=_ModelConfig,
        __module__=__name__,
        __doc__=_ModelConfig.__doc__,
        **{
            kind.section: (kind | None, Field(None, description=f"{kind.title}, letter {letter}"))
            for letter, kind in MIXERS.items()
        },
    )


Passes = Annotated[int, Field(ge=1, le=1024)]


class SleepConfig(Section):
    """How a window is written into the fast weights before it is evicted (arXiv 2605.26099)."""

    passes: Passes | Annotated[list[Passes], Field(min_length=1)] = Field(
        1,
        description="N, passes over a consolidation window; a list: N is drawn from it at every step; {0: 1, 2000: 4}: 4 after 2000 steps",
    )
    pass_weights: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="with a list of passes: how often each is drawn, relative to the others; null: all alike; or by step",
    )
    eviction: Literal["hard", "sliding"] = Field(
        "hard",
        description="what a window leaves beside fast weights: hard nothing, sliding its newest L-1 keys, values; or by step",
    )
    every_window: bool = Field(
        False, description="sleep on windows with loss tokens too, once they were read: for text, where all bear loss"
    )
    carry: bool = Field(
        False,
        description="a document longer than a sequence continues in the next step, from the fast weights that it left",
    )
    pass_norm: bool = Field(False, description="RMSNorm on the hidden states handed from pass to pass")
    reinject_embeddings: bool = Field(False, description="add the window's embeddings to the input of every pass")
    pass_input: Literal["hidden", "embeddings"] = Field(
        "hidden",
        description="what passes after the first see: hidden states of the pass before, or the embeddings again",
    )
    write: Literal["every", "last"] = Field(
        "every",
        description="which passes write: every one, or the last alone, all starting from the window's first state",
    )
    backprop_passes: int | None = Field(
        None,
        ge=1,
        description="back-propagate through the last k passes of a window only; null: through all; or by step",
    )
    loop_range: tuple[int, int] | None = Field(
        None,
        description="[i, j]: only blocks i .. j-1 repeat, those before run in the first pass, those after in the last",
    )

    @field_validator("loop_range", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # YAML has no tuples

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        if self.pass_weights is not None and len(self.pass_weights) != len(self.pass_choices):
            raise ValueError(
                f"pass_weights={self.pass_weights} are {len(self.pass_weights)}, passes={self.passes} has "
                f"{len(self.pass_choices)}: write one for each"
            )
        return self

    @model_validator(mode="after")
    def _embeddings_again_fit(self) -> Self:
        if self.pass_input == "hidden":
            return self
        for field, instead, why in (
            ("pass_norm", "false", "no hidden states are handed from pass to pass"),
            ("reinject_embeddings", "false", "every pass begins with the embeddings alone"),
            ("loop_range", "null", "a pass after the first would get embeddings in the middle of the stack"),
            ("write", "every", "every pass would do the same"),
        ):
            if (value := getattr(self, field)) != type(self).model_fields[field].default:
                value = list(value) if isinstance(value, tuple) else str(value).lower()
                raise ValueError(
                    f"pass_input=embeddings with {field}={value}: {why}; write sleep.{field}={instead}, or "
                    "sleep.pass_input=hidden"
                )
        return self

    def pass_blocks(self, model: ModelConfig, passes: int) -> list[range]:
        """The blocks that each of the N passes over a consolidation window runs.

        Blocks before the loop run in the first pass, those after it in the last. A pass whose hidden states are unused
        ends with its last write.
        """
        first, stop = self.loop_range or (0, model.num_layers)
        stops = [stop] * (passes - 1)
        if self.pass_input == "embeddings":
            stops = [model.after_last_write] * (passes - 1)
        # Under sliding eviction the last pass also fills the KV caches, so it runs all blocks.
        stops.append(model.num_layers if self.eviction == "sliding" else model.after_last_write)
        return [range(0 if number == 0 else first, stop) for number, stop in enumerate(stops)]

    def only_writes(self, pass_number: int, passes: int) -> bool:
        """Whether the hidden states of a pass over a consolidation window are unused."""
        return pass_number == passes or self.pass_input == "embeddings"

    @property
    def pass_choices(self) -> list[int]:
        return self.passes if isinstance(self.passes, list) else [self.passes]

    @property
    def pass_shares(self) -> dict[int, float]:
        """How often each N is drawn, of all steps."""
        weights = self.pass_weights or [1.0] * len(self.pass_choices)
        shares: dict[int, float] = {}
        for passes, weight in zip(self.pass_choices, weights, strict=True):
            shares[passes] = shares.get(passes, 0.0) + weight / sum(weights)
        return shares

    def check_against(self, model: ModelConfig) -> None:
        """Raise ValueError if these settings do not fit `model`."""
        if self.carry and self.eviction == "sliding":
            raise ValueError("carry=true carries fast weights alone, no cached keys: use eviction=hard")
        if self.carry and not model.fast_weight_blocks:
            raise ValueError(
                f"carry=true needs a block with fast weights ({WITH_FAST_WEIGHTS}): model.pattern={model.pattern} has none"
            )
        if self.eviction == "hard" and max(self.pass_choices) > 1 and not model.fast_weight_blocks:
            raise ValueError(
                f"sleep.passes={self.passes} with model.pattern={model.pattern}: without fast weights "
                f"({WITH_FAST_WEIGHTS}) sleep writes nothing; write sleep.passes=1"
            )
        if self.loop_range is None:
            return
        first, last = self.loop_range
        if not 0 <= first < last <= model.num_layers:
            raise ValueError(
                f"loop_range={[first, last]} must satisfy 0 <= i < j <= {model.num_layers} (blocks in {model.pattern})"
            )
        if self.eviction == "hard" and not any(first <= block < last for block in model.fast_weight_blocks):
            raise ValueError(
                f"loop_range={[first, last]} repeats only {model.pattern[first:last]}: it must hold a block with fast "
                f"weights ({WITH_FAST_WEIGHTS}), or the extra passes write nothing"
            )
