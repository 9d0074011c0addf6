"""The registry of sequence mixers: letter in model.pattern -> section of the recipe. Nothing here imports torch."""

import inspect

from powernap.model.mixers.attention import Attention
from powernap.model.mixers.gated_delta_net import GatedDeltaNet
from powernap.model.mixers.jet_block import JetBlock
from powernap.model.mixers.kimi_delta_attention import KimiDeltaAttention
from powernap.model.mixers.mamba2 import Mamba2
from powernap.model.mixers.sliding_attention import SlidingAttention
from powernap.model.part import Mixer
from powernap.model.plugins import PluginError, plugins

BUILT_IN: tuple[type[Mixer], ...] = (Attention, GatedDeltaNet, Mamba2, KimiDeltaAttention, SlidingAttention, JetBlock)


def _registry() -> dict[str, type[Mixer]]:
    """The built-in mixers and those of installed packages (entry points of `powernap.mixers`)."""
    mixers: dict[str, type[Mixer]] = {}
    for name, kind in [*((mixer.__name__, mixer) for mixer in BUILT_IN), *plugins("mixers").items()]:
        label = f"entry point {name} of powernap.mixers"
        if not (inspect.isclass(kind) and issubclass(kind, Mixer)):
            raise PluginError(f"{label}: {kind!r} is no class derived from powernap.model.part.Mixer")
        if unnamed := [field for field in ("letter", "title", "section") if not hasattr(kind, field)]:
            raise PluginError(f"{label}: {kind.__name__} does not say its {unnamed[0]}")
        missing = sorted(kind.__abstractmethods__)
        if kind.has_fast_weights and kind.state_shape is Mixer.state_shape:
            missing.append("state_shape, which has_fast_weights needs")
        if missing:
            raise PluginError(f"{label}: {kind.__name__} lacks {', '.join(missing)}")
        if len(kind.letter) != 1 or not kind.letter.isupper() or not kind.section.isidentifier():
            raise PluginError(
                f"{label}: letter={kind.letter!r} must be one capital letter, section={kind.section!r} a name"
            )
        for other in mixers.values():
            if kind.letter == other.letter or kind.section == other.section:
                raise PluginError(
                    f"{label}: letter {kind.letter} and section {kind.section} must differ from those of {other.title} "
                    f"({other.letter}, {other.section})"
                )
        mixers[kind.letter] = kind
    return mixers


MIXERS = _registry()
