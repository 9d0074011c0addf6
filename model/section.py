"""The base of every section of a recipe, a profile or a task. Nothing here imports torch."""

from pydantic import BaseModel, ConfigDict, field_validator

LARGEST = 2**32  # upper bound of integer fields, so that derived sizes stay exact


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, values keep their type (no "4" for 4)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_larger(cls, value: object) -> object:
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, int) and abs(part) > LARGEST:
                raise ValueError(f"no whole number is larger than {LARGEST}")
        return value
