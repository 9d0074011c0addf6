"""Files beside a model that say how text becomes tokens, and where an answer ends."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from powernap.train.weights_folder import TOKENIZER


def write_tokens(folder: Path, vocabulary: Mapping[str, Any], pad: int | None) -> dict[str, int | None]:
    """Write generation_config.json, and a tokenizer_config.json beside a tokenizer.json; returns the ids of end and pad for
    config.json. A task's words, and bytes, have no tokenizer that transformers knows.

    Args:
        vocabulary: as `export_vocabulary` returns it.
    """
    ids = {"eos_token_id": vocabulary.get("end_token_id"), "pad_token_id": pad}
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    if (folder / TOKENIZER).is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        names = {key.removesuffix("_id"): tokenizer.id_to_token(n) for key, n in ids.items() if n is not None}
        content = {"tokenizer_class": "PreTrainedTokenizerFast", **{key: name for key, name in names.items() if name}}
        (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")
    return ids
