"""All parameters of a model or a stage, as its parts list them. Nothing here imports torch."""

from fnmatch import fnmatchcase
from functools import lru_cache

from powernap.model.config import ModelConfig, SleepConfig
from powernap.model.part import Weight


def parameters(model: ModelConfig, sleep: SleepConfig, blocks: range) -> tuple[Weight, ...]:
    """The parameters of the stage that owns `blocks`, shaped as in stage.py, not split over tensor ranks; names are those in
    the whole model (HybridStage.global_name)."""
    return _parameters(model, sleep.pass_norm, blocks)


@lru_cache(maxsize=1000)  # `powernap plan --suggest` asks thousands of times
def _parameters(model: ModelConfig, pass_norm: bool, blocks: range) -> tuple[Weight, ...]:
    first, last = blocks.start == 0, blocks.stop == model.num_layers
    vocabulary = (model.vocab_size, model.hidden_size)
    weights = []
    if first or (last and model.tie_embeddings):
        weights.append(Weight("embedding.weight", vocabulary, split=0))
    if first and pass_norm:
        weights.append(Weight("pass_norm.weight", (model.hidden_size,)))
    for block in blocks:
        weights += [w._replace(name=f"decoder.layers.{block}.{w.name}") for w in _block_parameters(model, block)]
    if last:
        weights.append(Weight("decoder.final_layernorm.weight", (model.hidden_size,)))
        if not model.tie_embeddings:
            weights.append(Weight("output_layer.weight", vocabulary, split=0))
    return tuple(weights)


def count_parameters(model: ModelConfig, sleep: SleepConfig) -> int:
    """Of the whole model."""
    return sum(weight.size() for weight in parameters(model, sleep, range(model.num_layers)))


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name of the parameter or of a module around it; *, ? and [0-3] are those of a shell."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


def float32_names(model: ModelConfig, sleep: SleepConfig) -> set[str]:
    """Parameters of the whole model that are not rounded with the others."""
    return {weight.name for weight in parameters(model, sleep, range(model.num_layers)) if weight.float32}


def _block_parameters(model: ModelConfig, block: int) -> list[Weight]:
    def inside(module: str, weights: list[Weight]) -> list[Weight]:
        return [w._replace(name=f"{module}.{w.name}") for w in weights]

    norms = [Weight(f"{name}.weight", (model.hidden_size,)) for name in model.block_norms(block)]
    return [
        *inside("self_attention", model.mixer(block).weights(model)),
        *(inside("mlp", model.mlp.weights(model)) if model.has_mlp(block) else []),
        *norms,
    ]
