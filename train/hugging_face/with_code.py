"""A checkpoint as a folder that transformers loads with trust_remote_code=True, and that sleeps there.

It is the folder of `powernap checkpoint export` with what transformers needs besides: remote_code/, a model in plain torch
that needs no Powernap.
"""

import json
import shutil
from pathlib import Path

from powernap.parallel.checkpoint.reader import Checkpoint
from powernap.train.config import Recipe
from powernap.train.generation.export import new_folder, write_model
from powernap.train.hugging_face.families import HuggingFaceError
from powernap.train.hugging_face.token_files import write_tokens
from powernap.train.weights_folder import CONFIG

CODE = Path(__file__).with_name("remote_code")
CLASSES = {
    "AutoConfig": "configuration_powernap.PowernapConfig",
    "AutoModelForCausalLM": "modeling_powernap.PowernapForCausalLM",
}
LETTERS = "AGJKMS"  # that it computes: another package's mixer it does not know
CARD = """# {name}

Trained with Powernap, exported after step {step:,}: pattern {pattern}, windows of {window} tokens, N={passes}. It sleeps here, too:

    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(tokens, max_new_tokens=100)

Keys and values are kept for the current window only; a full one is written into the fast weights by {passes} passes. Texts of a batch
have one length. `model.config.sleep["passes"] = 1` sets another N. The code is plain torch, for checks and evaluation; `powernap
generate FOLDER` reads the same folder.
"""


def export_with_code(checkpoint: Checkpoint, recipe: Recipe, to: Path) -> Path:
    """Write a checkpoint's model and its code into the new folder `to`, which appears complete or not at all.

    Raises:
        HuggingFaceError: if a block is another package's.
    """
    if unknown := sorted(set(recipe.model.pattern.upper()) - set(LETTERS)):
        raise HuggingFaceError(
            f"model.pattern={recipe.model.pattern}: {unknown[0]} is another package's: export without --format"
        )
    with new_folder(to) as unfinished:
        ours = write_model(checkpoint, recipe, unfinished)
        vocabulary = ours["vocabulary"] or {}
        ids = write_tokens(unfinished, vocabulary, recipe.model.pad_token_id)
        config = {
            "model_type": "powernap",
            "architectures": [CLASSES["AutoModelForCausalLM"].split(".")[1]],
            "auto_map": CLASSES,
            "dtype": "bfloat16" if recipe.train.precision == "bf16" else "float32",
            "tie_word_embeddings": recipe.model.tie_embeddings,
            **ids,
            **ours,
        }
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for file in sorted(CODE.glob("*.py")):
            shutil.copyfile(file, unfinished / file.name)
        card = CARD.format(
            name=recipe.run.name, step=checkpoint.step, pattern=recipe.model.pattern, window=recipe.model.window,
            passes=max(recipe.sleep.pass_choices),
        )  # fmt: skip
        (unfinished / "README.md").write_text(card)
    return to
