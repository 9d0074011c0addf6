"""A training step beside transformers' OLMo-Hybrid: the same weights and tokens, N = 1, one window, float32, one process.

transformers' side is the loop one would write: its model, clip_grad_norm_, torch.optim.AdamW(fused=True). It recomputes by
block, Powernap by segment; both are compared with recomputation and without. Losses are asserted equal.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import interleave, join_alone, milliseconds, paired_ratio, table, verdicts, write
from powernap.model.config import ModelConfig
from powernap.parallel.topology import Topology
from powernap.train import trainer
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch
from powernap.train.hugging_face.folder import HuggingFaceFolder, HuggingFaceShards
from powernap.train.lr_schedule import lr_factor

# name: blocks, width, of the MLP, vocabulary, tokens of a sequence, sequences
SIZES = {"d=256, V=512": (4, 256, 512, 512, 512, 2), "d=512, V=32,768": (8, 512, 1536, 32768, 128, 1)}
HEAD = 64
BAR = 1.05


def main(options: argparse.Namespace, command: str) -> None:
    topology, numbers, rows, targets = join_alone(), {}, [], []
    for name in SIZES:
        print(f"beside_transformers: {name}", flush=True)
        numbers[name] = compare(name, topology, 2 if options.quick else 10)
        for kind, found in numbers[name].items():
            rows.append([name, kind, *found["ms"].values(), found["over_transformers"]])
            targets.append((f"{name}: {kind}", found["over_transformers"], "<=", BAR))
    judged, verdict = verdicts(targets)
    report = [
        "Blocks G and A in turn, heads of 64. Milliseconds a step, with clipping and AdamW.",
        "",
        *table(["model", "recompute", "powernap", "transformers", "over transformers"], rows, left=2),
        "",
    ]
    write("beside_transformers", command, {"sizes": numbers, "targets": judged}, [*report, *verdict])


def compare(name: str, topology: Topology, rounds: int) -> dict:
    _, _, _, vocabulary, length, sequences = SIZES[name]
    tokens = torch.randint(vocabulary, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    forms = {}
    with tempfile.TemporaryDirectory() as folder:
        olmo_hybrid(name).save_pretrained(folder)
        read = HuggingFaceFolder.read(Path(folder))
        for kind in ("segment", "none"):
            recipe = Recipe(
                run={"name": "benchmark"},
                model=ModelConfig(window=length, **read.section),
                data={"train": "-", "sequence_length": length + 1},
                train={"steps": 1000, "global_batch_size": sequences, "recompute": kind},
            )
            forms[f"powernap {kind}"] = powernap_step(recipe, HuggingFaceShards(read, recipe.model), tokens, topology)
            forms[f"transformers {kind}"] = transformers_step(olmo_hybrid(name), recipe, tokens)
        losses = [form() for form in forms.values()]
    assert max(losses) - min(losses) < 1e-4 * max(losses), f"the forms compute different things: {losses}"
    times, found = interleave(forms, rounds), {}
    for kind in ("segment", "none"):
        ours, theirs = times[f"powernap {kind}"], times[f"transformers {kind}"]
        found[kind] = {
            "ms": {"powernap": milliseconds(ours), "transformers": milliseconds(theirs)},
            "over_transformers": paired_ratio(ours, theirs),
        }
    return found


def olmo_hybrid(name: str) -> torch.nn.Module:
    from transformers import OlmoHybridConfig, OlmoHybridForCausalLM

    blocks, width, mlp, vocabulary, length, _ = SIZES[name]
    heads = width // HEAD
    torch.manual_seed(0)
    return OlmoHybridForCausalLM(
        OlmoHybridConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=blocks,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length,
            layer_types=["linear_attention", "full_attention"] * (blocks // 2),
            linear_num_key_heads=heads, linear_num_value_heads=heads, linear_key_head_dim=HEAD,
            linear_value_head_dim=HEAD, pad_token_id=None, eos_token_id=None, use_cache=False,
        )
    )  # fmt: skip


def powernap_step(
    recipe: Recipe, weights: HuggingFaceShards, tokens: torch.Tensor, topology: Topology
) -> Callable[[], float]:
    stage, zero = trainer.build(recipe, topology)
    with torch.no_grad():  # in float32 they are the optimizer's, too
        for name, parameter in stage.named_parameters():
            parameter.copy_(weights.shard(name, None, 0, 1))
    loss_mask = torch.ones_like(tokens, dtype=torch.bool)
    batch = Batch(tokens, loss_mask, is_document_start=torch.ones(len(tokens), dtype=torch.bool), answers=[])
    # Step 2: health metrics are off, as in all steps but every log_every-th.
    return lambda: trainer.train_step(recipe, stage, zero, batch, 2, topology)[0]["loss"]


def transformers_step(model: torch.nn.Module, recipe: Recipe, tokens: torch.Tensor) -> Callable[[], float]:
    if recipe.train.recompute != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    config, parameters = recipe.optimizer, list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    lr = config.lr * lr_factor(2, recipe.train.steps, config)  # as train_step sets it at step 2
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)

    def run() -> float:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return run
