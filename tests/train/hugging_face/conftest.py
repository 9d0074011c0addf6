import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.hugging_face import MODELS, make


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """name -> (transformers' model, the folder it was saved in)."""
    folders = {name: tmp_path_factory.mktemp("hf") / name.replace(", ", "-").replace(" ", "-") for name in MODELS}
    return {name: (make(name, folder), folder) for name, folder in folders.items()}


@pytest.fixture
def nested(models, tmp_path):
    """As released: the text model inside one that sees, two files with an index, bfloat16, further heads."""
    source = models["qwen3_5"][1]
    weights = {
        name.replace("model.", "model.language_model.", 1): t.bfloat16()
        for name, t in load_file(source / "model.safetensors").items()
    }
    weights |= {"model.visual.patch.weight": torch.ones(3, 4), "mtp.fc.weight": torch.ones(2, 2)}
    names = sorted(weights)
    files = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for file, part in files.items():
        save_file({name: weights[name].contiguous() for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    text = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    return tmp_path  # fmt: skip
