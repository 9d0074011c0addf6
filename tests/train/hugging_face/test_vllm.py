"""Exports as vLLM serves them on a CPU: the log probabilities of a prompt are those of transformers.

Needs `make test-vllm`. Its attention on a CPU wants heads of 32 or more, its gated delta net bf16 and heads of 128; OLMo-Hybrid's
layer needs a GPU there.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from powernap.launch import cli
from tests.helpers import runs
from tests.helpers.hugging_face import make

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv" / "vllm" / "bin" / "python"
WIDE = {
    "hidden_size": 128, "intermediate_size": 96, "head_dim": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
IN_FP32, IN_BF16 = ("llama", "qwen3", "qwen2", "olmo2"), ("qwen3_5, shared keys", "qwen3_5, tied", "qwen3_next")
CHANGES = [
    "data.train=data/train-*.tar", "data.sequence_length=24", "model.pad_token_id=0", "train.precision=fp32",
    "train.steps=5", "train.global_batch_size=8", "optimizer.warmup_steps=1", "optimizer.lr=1e-3",
    "sleep.every_window=false",
]  # fmt: skip

if not os.environ.get("POWERNAP_TEST_VLLM"):
    pytest.skip("make test-vllm gets vLLM and runs them", allow_module_level=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("vllm")).parent


def exported(place: Path, name: str, like: bool) -> Path:
    """A model that was trained for five steps, in Hugging Face's format."""
    folder = place / f"{name}-{like}".replace(", ", "-").replace(" ", "-")
    make(name, folder / "source", **WIDE)
    (place / "tiny.yaml").unlink(missing_ok=True)
    recipe = ["import", str(folder / "source"), "--recipe", str(place / "tiny.yaml"), "--window", "12"]
    assert cli.main(recipe) == 0
    run = runs.train_in_turn(place, 1, {folder.name: CHANGES})[folder.name]
    options = ["--like", str(folder / "source")] if like else []
    to = str(folder / "out")
    assert cli.main(["checkpoint", "export", str(run), to, "--format", "hf", *options]) == 0
    return folder / "out"


def served(folder: Path, dtype: str, tokens: list[int]) -> list[dict[int, float]]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    script = ROOT / "tests" / "helpers" / "vllm_logprobs.py"
    done = subprocess.run(
        [PYTHON, script, folder, dtype, *map(str, tokens)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        {int(token): value for token, value in of_one.items()} for of_one in json.loads(done.stdout.splitlines()[-1])
    ]


def computed(folder: Path, dtype: torch.dtype, tokens: list[int]) -> torch.Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)


def differences(found: list[dict[int, float]], expected: torch.Tensor) -> list[float]:
    return [
        abs(value - float(row[token]))
        for of_one, row in zip(found, expected, strict=True)
        for token, value in of_one.items()
    ]


TOKENS = torch.randint(1, 60, (20,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("like", [False, True], ids=["alone", "like its source"])
@pytest.mark.parametrize("name", IN_FP32)
def test_in_fp32(place, name, like):
    folder = exported(place, name, like)
    found = differences(served(folder, "float32", TOKENS), computed(folder, torch.float32, TOKENS))
    print(f"{name}: {max(found):.1e} over {len(found)}")
    assert len(found) >= 19 * 5 and max(found) < 1e-5


@pytest.mark.parametrize("name", IN_BF16)
def test_in_bf16(place, name):
    """As far from fp32 as transformers in bf16 is, or not much farther."""
    if subprocess.run([PYTHON, "-c", "import torchvision"], capture_output=True).returncode:
        pytest.skip("vLLM's Qwen3.5 needs a torchvision that goes with a CPU torch")
    folder = exported(place, name, like=False)
    expected, found = computed(folder, torch.float32, TOKENS), served(folder, "bfloat16", TOKENS)
    theirs = computed(folder, torch.bfloat16, TOKENS)
    chosen = [{token: float(row[token]) for token in of_one} for of_one, row in zip(found, theirs, strict=True)]
    mean, theirs_mean = (torch.tensor(differences(of, expected)).square().mean().sqrt() for of in (found, chosen))
    print(f"{name}: rms {mean:.3f}, transformers in bf16 {theirs_mean:.3f}")
    assert mean < 2 * theirs_mean
