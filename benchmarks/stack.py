"""What Powernap's stack costs over plain PyTorch: one training step, N = 1, one process.

The same weights, windows and tokens go through

* powernap: train.trainer.train_step, that is Megatron-core's layers, the schedule, DeepSpeed ZeRO, metrics;
* blocks: the same HybridStage called window by window in a plain loop, torch.optim.AdamW, clip_grad_norm_;
* plain: the same network of nn.Linear and functions, without Megatron-core; delta rule and convolution are ours.

Each with every window's activations recomputed (torch.utils.checkpoint) and with all of them kept. All three skip
unused outputs: in windows without loss the last block only writes its fast weights.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.common import interleave, join_alone, milliseconds, paired_ratio, table, verdicts, write
from benchmarks.sleep import MODEL
from powernap.model.config import ModelConfig
from powernap.model.mixers.conv import causal_conv
from powernap.model.mixers.delta_rule import gated_delta_rule
from powernap.model.mixers.rotary import rotary_of, rotate
from powernap.model.stage import HybridStage
from powernap.model.window import Positions, Window
from powernap.parallel.topology import Topology
from powernap.train import trainer
from powernap.train.config import Recipe
from powernap.train.data.loader import Batch
from powernap.train.recipe_file import load_recipe


def main(options: argparse.Namespace, command: str) -> None:
    topology = join_alone()
    sizes = {"d=256": (recipe_256(), 3 if options.quick else 20), "demo": (recipe_demo(), 10 if options.quick else 100)}
    numbers, report = {}, []
    for name, (recipe, rounds) in sizes.items():
        print(f"stack: {name}", flush=True)
        numbers[name], lines = compare(name, recipe, topology, rounds)
        report += lines
    price = numbers["d=256"]["recompute"]["powernap_over_blocks"]
    judged, verdict = verdicts([("d=256: powernap over blocks", price, "<=", 1.05)])
    write("stack", command, {"sizes": numbers, "targets": judged}, [*report, *verdict])


def recipe_256() -> Recipe:
    """The hybrid of benchmarks/sleep.py."""
    return Recipe(
        run={"name": "benchmark"},
        model=MODEL,
        data={"train": "-", "sequence_length": 3 * MODEL.window + 1},
        train={"steps": 1000, "global_batch_size": 8},
    )


def recipe_demo() -> Recipe:
    """The step of one of the demo's two processes, with N = 1."""
    return load_recipe("demo", ["sleep.passes=1", "parallel.data=1", "train.global_batch_size=32"])


def compare(name: str, recipe: Recipe, topology: Topology, rounds: int) -> tuple[dict, list[str]]:
    clock = Clock()
    batch = synthetic_batch(recipe)
    forms = {}
    for recompute in (True, False):
        kind = "recompute" if recompute else "keep"
        train = {"recompute": "segment" if recompute else "none"}
        own = recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})
        forms[f"powernap {kind}"] = powernap_step(own, topology, batch, clock.of(f"powernap {kind}"))
        for form, build in (("blocks", Blocks), ("plain", Plain)):
            torch.manual_seed(0)
            network = build(HybridStage(recipe.model, recipe.sleep, topology.groups))
            forms[f"{form} {kind}"] = plain_step(network, recipe, batch, recompute, clock.of(f"{form} {kind}"))
    losses = [form() for form in forms.values()]
    assert max(losses) - min(losses) < 1e-4 * max(losses), f"the forms compute different things: {losses}"
    clock.reset()
    times = interleave(forms, rounds)

    numbers, rows = {"sequences": recipe.train.global_batch_size, "model": recipe.model.model_dump()}, []
    for kind in ("recompute", "keep"):
        ours, blocks, plain = (times[f"{form} {kind}"] for form in ("powernap", "blocks", "plain"))
        numbers[kind] = {
            "ms": {form: milliseconds(times[f"{form} {kind}"]) for form in ("powernap", "blocks", "plain")},
            "powernap_over_blocks": paired_ratio(ours, blocks),
            "powernap_over_plain": paired_ratio(ours, plain),
            "blocks_over_plain": paired_ratio(blocks, plain),
            "parts_ms": {form: clock.medians(f"{form} {kind}") for form in ("powernap", "blocks", "plain")},
        }
        n = numbers[kind]
        rows.append([kind, *n["ms"].values(), n["powernap_over_blocks"], n["powernap_over_plain"]])
    model = recipe.model
    report = [
        f"## {name}",
        "",
        f"{model.pattern}, d={model.hidden_size}, {recipe.train.global_batch_size} sequences of "
        f"{recipe.data.sequence_length} tokens, windows of {model.window}. Milliseconds a step.",
        "",
        *table(["activations", "powernap", "blocks", "plain", "over blocks", "over plain"], rows),
        "",
        "Where it goes, with recomputation:",
        "",
        *parts_table(numbers["recompute"]),
        "",
    ]
    return numbers, report


def parts_table(numbers: dict) -> list[str]:
    rows = []
    for part in ("plan segments", "forward, backward", "clip, update", "rest"):
        rows.append([part, *(numbers["parts_ms"][form].get(part) for form in ("powernap", "blocks", "plain"))])
    return table(["ms", "powernap", "blocks", "plain"], rows)


class Clock:
    """Seconds of a step's parts, summed over the step, one list entry per step."""

    def __init__(self):
        self._steps: dict[str, list[dict[str, float]]] = defaultdict(list)

    def of(self, form: str) -> "FormClock":
        return FormClock(self._steps[form])

    def reset(self) -> None:
        for steps in self._steps.values():
            steps.clear()

    def medians(self, form: str) -> dict[str, float]:
        return {part: milliseconds([step[part] for step in self._steps[form]]) for part in self._steps[form][0]}


class FormClock:
    def __init__(self, steps: list[dict[str, float]]):
        self._steps = steps

    @contextmanager
    def step(self) -> Iterator[None]:
        self.parts = defaultdict(float)
        start = time.process_time()
        yield
        self.parts["rest"] = time.process_time() - start - sum(self.parts.values())
        self._steps.append(dict(self.parts))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.parts[name] += time.process_time() - start

    def around(self, name: str, function):
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def synthetic_batch(recipe: Recipe) -> Batch:
    """Random tokens with the loss on every other token of the last window."""
    generator = torch.Generator().manual_seed(1)
    shape = (recipe.train.global_batch_size, recipe.data.sequence_length)
    tokens = torch.randint(1, recipe.model.vocab_size, shape, generator=generator)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    last = (shape[1] - 2) // recipe.model.window * recipe.model.window
    loss_mask[:, last + 1 :: 2] = True
    return Batch(tokens, loss_mask, is_document_start=torch.ones(len(tokens), dtype=torch.bool), answers=[])


def powernap_step(recipe: Recipe, topology: Topology, batch: Batch, clock: FormClock):
    stage, zero = trainer.build(recipe, topology)
    zero_step = zero.step

    def run() -> float:
        with ExitStack() as stack:
            for part, owner, name in (
                ("plan segments", trainer, "plan_segments"),
                ("forward, backward", trainer, "forward_backward"),
            ):
                stack.enter_context(mock.patch.object(owner, name, clock.around(part, getattr(owner, name))))
            stack.enter_context(mock.patch.object(zero, "step", clock.around("clip, update", zero_step)))
            with clock.step():  # step 2: health metrics are off, as in all steps but every log_every-th
                return trainer.train_step(recipe, stage, zero, batch, 2, topology)[0]["loss"]

    return run


def plain_step(network: nn.Module, recipe: Recipe, batch: Batch, recompute: bool, clock: FormClock):
    """The loop one would write without a framework."""
    config = recipe.optimizer
    lr = config.lr * trainer.lr_factor(2, recipe.train.steps, config)  # as train_step sets it at step 2
    matrices, rest = ([p for p in network.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)
    model = recipe.model
    inputs, targets, mask = batch.tokens[:, :-1], batch.tokens[:, 1:].t(), batch.loss_mask[:, 1:].t()
    windows = []
    for start in range(0, inputs.shape[1], model.window):
        where = slice(start, start + model.window)
        windows.append((inputs[:, where], targets[where], mask[where], bool(mask[where].any())))
    loss_tokens = int(mask.sum())

    def run() -> float:
        with clock.step():
            with clock.part("forward, backward"):
                states = network.zero_states(len(inputs))
                total = 0.0
                for tokens, target, own_mask, predicts in windows:

                    def read(tokens, *states, target=target, own_mask=own_mask, predicts=predicts):
                        logits, states = network(tokens, states, predicts)
                        if not predicts:
                            return None, *states
                        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
                        return (losses.view_as(target) * own_mask).sum(), *states

                    if recompute:
                        loss, *states = checkpoint(read, tokens, *states, use_reentrant=False, preserve_rng_state=False)
                    else:
                        loss, *states = read(tokens, *states)
                    total = total + loss if predicts else total
                loss = total / loss_tokens
                loss.backward()
            with clock.part("clip, update"):
                nn.utils.clip_grad_norm_(network.parameters(), config.clip)
                optimizer.step()
                optimizer.zero_grad()
        return loss.item()

    return run


class Blocks(nn.Module):
    """Our blocks, called directly."""

    def __init__(self, stage: HybridStage):
        super().__init__()
        for name, child in stage.named_children():
            self.add_module(name, child)
        self._stage = [stage]  # in a list, so that its parameters are not registered twice

    def zero_states(self, batch: int) -> list[torch.Tensor]:
        return list(self._stage[0].empty_layer_states(batch))

    def forward(self, tokens, states, predicts: bool):
        stage = self._stage[0]
        window = Window(Positions((0,), tokens.shape[1]))
        hidden = stage._embed(tokens)
        hidden, states = stage.decoder(hidden, tuple(states), window, range(stage.model.num_layers), not predicts)
        return stage._logits(hidden) if predicts else None, states


class Plain(nn.Module):
    """The same network in plain torch, batch-first, with the weights of a HybridStage."""

    def __init__(self, stage: HybridStage):
        super().__init__()
        model = self.model = stage.model
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.decoder = nn.ModuleList(PlainBlock(layer, model) for layer in stage.decoder.layers)
        self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        self.embedding.weight.data.copy_(stage.embedding.weight.data)
        self.head.weight.data.copy_(stage.output_layer.weight.data)
        self._rotary = {}

    def zero_states(self, batch: int) -> list[torch.Tensor]:
        model = self.model
        return [torch.zeros(batch, *model.gdn.state_shape) for _ in model.fast_weight_blocks]

    def forward(self, tokens, states, predicts: bool):
        model, length, states = self.model, tokens.shape[1], list(states)
        if length not in self._rotary:
            attention = model.attention
            cos, sin = rotary_of(Positions((0,), length), attention.width(model), attention.rope_base, self.norm.weight)
            self._rotary[length] = cos.transpose(0, 1), sin.transpose(0, 1)  # [1, L, 1, 1, head_dim]
        x, place, last = self.embedding(tokens), 0, model.pattern.rfind("G")
        for index, block in enumerate(self.decoder):
            if model.pattern[index] == "A":
                x = x + block.attend(block.norm_1(x), self._rotary[length])
            else:
                state_only = index == last and not predicts
                mixed, states[place] = block.recur(block.norm_1(x), states[place], state_only)
                if state_only:
                    return None, states
                x, place = x + mixed, place + 1
            x = x + block.mlp(block.norm_2(x))
        return self.head(self.norm(x)).transpose(0, 1), states


class PlainBlock(nn.Module):
    def __init__(self, layer, model: ModelConfig):
        super().__init__()
        self.sizes = model
        mixer, d = layer.self_attention, model.hidden_size
        self.norm_1, self.norm_2 = (nn.RMSNorm(d, eps=model.norm_eps) for _ in range(2))
        weights = {"fc1": layer.mlp.linear_fc1, "fc2": layer.mlp.linear_fc2, "out_proj": mixer.out_proj}
        weights["in_proj"] = mixer.in_proj if mixer.has_state else mixer.qkv_proj
        for name, theirs in weights.items():
            linear = nn.Linear(*reversed(theirs.weight.shape), bias=False)
            linear.weight.data.copy_(theirs.weight.data)
            self.add_module(name, linear)
        if mixer.has_state:
            for name in ("conv_weight", "A_log", "dt_bias"):
                self.register_parameter(name, nn.Parameter(getattr(mixer, name).data.clone()))
            self.norm_out = nn.RMSNorm(model.gdn.value_dim, eps=model.norm_eps)

    def mlp(self, x):
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * up)

    def attend(self, x, rotary):
        batch, length, width = x.shape
        qkv = self.in_proj(x).view(batch, length, self.sizes.attention.heads, 3, -1)
        q, k = rotate(qkv[..., :2, :], *rotary).unbind(3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, qkv[..., 2, :]))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def recur(self, x, state, state_only: bool):
        m, (batch, length, _) = self.sizes.gdn, x.shape
        y = self.in_proj(x).view(batch, length, m.heads, -1)
        qkv, z, beta, alpha = y.split([2 * m.key_dim + m.value_dim, m.value_dim, 1, 1], dim=-1)
        qkv = F.silu(causal_conv(qkv.transpose(0, 1), self.conv_weight)).transpose(0, 1)
        q, k, v = qkv.split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
        g = -self.A_log.exp() * F.softplus(alpha.squeeze(-1) + self.dt_bias)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        output, state = gated_delta_rule(q, k, v, g, beta.squeeze(-1).sigmoid(), state, not state_only)
        if state_only:
            return None, state
        return self.out_proj((self.norm_out(output) * F.silu(z)).flatten(2)), state
