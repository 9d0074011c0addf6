"""A recipe that starts from a model in Hugging Face's format."""

import re
from typing import Any

from powernap.train.config import Recipe
from powernap.train.data.tokenizer import HuggingFace
from powernap.train.hugging_face.folder import HuggingFaceFolder
from powernap.train.recipe_file import check

WINDOWS = 4  # in a sequence


def recipe_of(folder: HuggingFaceFolder, window: int) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and the fields of it that are written down. Data, steps and optimizer are for the user to set."""
    model = folder.section
    text = folder.text_config
    # A pad leaves no trace in the fast weights: where it is the end of a document, too, that must leave one.
    pad = None if text.get("pad_token_id") == text.get("eos_token_id") else text.get("pad_token_id")
    if folder.tokenizer and (own := HuggingFace(folder.tokenizer).pad) < model["vocab_size"]:
        pad = own  # what `data build` pads with
    name = re.sub(r"[^\w.-]", "-", folder.path.resolve().name).lstrip(".-")[:50]
    values = {
        "run": {"name": f"{name}-sleeps"},
        "model": {"pattern": model.pop("pattern"), "window": window, "pad_token_id": pad, **model},
        # Attention alone has nothing to write into.
        "sleep": {"passes": 2 if "gdn" in model else 1, "every_window": True},
        "data": {"train": "data/text/train-*.tar", "sequence_length": WINDOWS * window + 1},
        "train": {"start_from": str(folder.path), "steps": 1000, "global_batch_size": 32, "precision": "bf16"},
        "optimizer": {"lr": 2.0e-5},
    }  # fmt: skip
    return check(Recipe, values), values
