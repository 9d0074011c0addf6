"""What a model is made of and how it sleeps: the `model` and `sleep` sections of a recipe.

Nothing here imports torch: `powernap --help` and every check of a recipe read these classes.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ATTENTION = "A"
GATED_DELTA_NET = "G"
LARGEST = 2**32  # of all whole numbers: what is computed from sizes must stay within a float


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, values keep their type (no "4" for 4)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_this_world(cls, value: object) -> object:
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, int) and abs(part) > LARGEST:
                raise ValueError(f"no whole number is larger than {LARGEST}")
            if isinstance(part, str) and "\0" in part:
                raise ValueError("a NUL character, which no file's name may have")
        return value


class ModelConfig(Section):
    """A stack of attention (A) and gated-delta-net (G) blocks, each followed by a SwiGLU MLP."""

    pattern: str = Field(
        "AGAG", min_length=1, max_length=256, description="one letter a block: A attention, G gated delta net"
    )
    window: int = Field(ge=1, description="L, tokens per window; the KV cache is evicted after each")
    vocab_size: int = Field(ge=2, description="tokens are 0 .. vocab_size - 1")
    pad_token_id: int | None = Field(None, ge=0, description="token that must leave no trace in the fast weights")
    hidden_size: int = Field(ge=1, description="width of the residual stream")
    ffn_hidden_size: int = Field(ge=1, description="width inside the SwiGLU MLP")
    num_attention_heads: int = Field(ge=1, description="heads of an attention block")
    gdn_heads: int = Field(ge=1, description="heads of a gated-delta-net block")
    gdn_key_dim: int = Field(ge=1, description="d_k, rows of a head's fast weights")
    gdn_value_dim: int = Field(ge=1, description="d_v, columns of a head's fast weights")
    conv_kernel: int = Field(4, ge=1, description="taps of the causal convolution before q, k and v")
    rope_base: float = Field(10000.0, gt=1, description="base of the rotary position embedding")
    norm_eps: float = Field(1e-6, gt=0, description="epsilon of every RMSNorm")
    embedding_std: float = Field(1.0, gt=0, description="standard deviation of the embeddings at the start")
    tie_embeddings: bool = Field(False, description="use the embedding matrix as the output head")

    @field_validator("pattern")
    @classmethod
    def _only_known_blocks(cls, pattern: str) -> str:
        if set(pattern) - {ATTENTION, GATED_DELTA_NET}:
            raise ValueError("use only the letters A (attention) and G (gated delta net)")
        return pattern

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}"
            )
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads = {self.hidden_size // self.num_attention_heads} must be even "
                "(rotary embeddings turn pairs)"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} must be below vocab_size={self.vocab_size}")
        return self

    @property
    def num_layers(self) -> int:
        return len(self.pattern)


Passes = Annotated[int, Field(ge=1, le=1024)]


class SleepConfig(Section):
    """How a window is written into the fast weights before it is evicted (arXiv 2605.26099)."""

    passes: Passes | Annotated[list[Passes], Field(min_length=1)] = Field(
        1, description="N, passes over a consolidation window; a list: N is drawn from it at every step"
    )
    eviction: Literal["hard", "sliding"] = Field(
        "hard",
        description="what a window leaves beside fast weights: hard nothing, sliding its newest L-1 keys, values",
    )
    every_window: bool = Field(
        False, description="sleep on windows with loss tokens too, once they were read: for text, where all bear loss"
    )
    carry: bool = Field(
        False,
        description="a document longer than a sequence goes on in the next step, from the fast weights it left",
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
        None, ge=1, description="back-propagate through the last k passes of a window only; null: through all"
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
        """The blocks each of the N passes over a consolidation window runs.

        Blocks before the loop run in the first pass, those after it in the last. A pass whose hidden states nobody reads
        ends with its last write.
        """
        first, stop = self.loop_range or (0, model.num_layers)
        stops = [stop] * (passes - 1)
        if self.pass_input == "embeddings":
            stops = [model.pattern.rfind(GATED_DELTA_NET) + 1] * (passes - 1)
        # In the last pass, under sliding eviction, attention leaves keys and values.
        stops.append(model.num_layers if self.eviction == "sliding" else model.pattern.rfind(GATED_DELTA_NET) + 1)
        return [range(0 if number == 0 else first, stop) for number, stop in enumerate(stops)]

    def only_writes(self, pass_number: int, passes: int) -> bool:
        """Whether nobody reads the hidden states of a pass over a consolidation window."""
        return pass_number == passes or self.pass_input == "embeddings"

    @property
    def pass_choices(self) -> list[int]:
        return self.passes if isinstance(self.passes, list) else [self.passes]

    def check_against(self, model: ModelConfig) -> None:
        """Raise ValueError if this way of sleeping does not fit `model`."""
        if self.carry and self.eviction == "sliding":
            raise ValueError("carry=true carries fast weights alone, no cached keys: use eviction=hard")
        if self.carry and GATED_DELTA_NET not in model.pattern:
            raise ValueError(f"carry=true needs a G block: model.pattern={model.pattern} has no fast weights to carry")
        if self.eviction == "hard" and max(self.pass_choices) > 1 and GATED_DELTA_NET not in model.pattern:
            raise ValueError(
                f"sleep.passes={self.passes} with model.pattern={model.pattern}: without a G block sleep writes nothing; "
                "write sleep.passes=1"
            )
        if self.loop_range is None:
            return
        first, last = self.loop_range
        if not 0 <= first < last <= model.num_layers:
            raise ValueError(
                f"loop_range={[first, last]} must satisfy 0 <= i < j <= {model.num_layers} (blocks in {model.pattern})"
            )
        if self.eviction == "hard" and GATED_DELTA_NET not in model.pattern[first:last]:
            raise ValueError(
                f"loop_range={[first, last]} repeats only {model.pattern[first:last]}: it must hold a G block, "
                "or the extra passes write nothing"
            )
