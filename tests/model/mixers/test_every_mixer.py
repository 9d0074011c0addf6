"""Each mixer of the registry against what the slot promises; and that the same checks see a mixer that lies.

In every parallel layout, too: tests/parallel/test_layouts.py.
"""

import pytest

from powernap.model.mixers import MIXERS
from powernap.model.mixers.gated_delta_net import GatedDeltaNet
from tests.helpers import mixers
from tests.helpers.cases import names


@pytest.mark.parametrize("letter", MIXERS)
@pytest.mark.parametrize("check", mixers.CHECKS, ids=lambda check: check.__name__)
def test_holds(topology, check, letter):
    check(topology, letter)


def without(name):
    return lambda self, model, listed=GatedDeltaNet.weights: [w for w in listed(self, model) if w.name != name]


def with_one_more(self, model, listed=GatedDeltaNet.weights):
    return [*listed(self, model), listed(self, model)[3]._replace(name="of_no_use")]


def with_split(name, split):
    return lambda self, model, listed=GatedDeltaNet.weights: [
        w._replace(split=split) if w.name == name else w for w in listed(self, model)
    ]


def scaled(method, factor):
    honest = getattr(GatedDeltaNet, method)
    return lambda *args, **kwargs: int(factor * honest(*args, **kwargs))


def written_to_by_pads(self, layer, hidden_states, state, window, *rest, honest=GatedDeltaNet.forward):
    from dataclasses import replace

    return honest(self, layer, hidden_states, state, replace(window, padding_mask=None), *rest)


def without_the_conv_state(self, layer, hidden_states, cache, window, honest=GatedDeltaNet.decode):
    cache["conv_state"] = cache["conv_state"] * 0
    return honest(self, layer, hidden_states, cache, window)


LIES = {
    "forgets a parameter": ("weights", without("dt_bias")),
    "forgets a projection": ("weights", without("out_proj.weight")),
    "lists one that nothing uses": ("weights", with_one_more),
    "splits a projection the wrong way": ("weights", with_split("out_proj.weight", 0)),
    "does not split what belongs to heads": ("weights", with_split("conv_weight", None)),
    "says half its state": ("state_bytes", scaled("state_bytes", 0.5)),
    "says another shape of it": ("state_shape", property(lambda self: (self.heads, self.value_dim, self.key_dim))),
    "hides its fast weights": ("has_state", lambda self, sleep: False),
    "says half its FLOPs": ("flops", scaled("flops", 0.5)),
    "says 5 % more": ("flops", scaled("flops", 1.05)),
    "says half its activations": ("activation_bytes", scaled("activation_bytes", 0.5)),
    "writes pads": ("forward", written_to_by_pads),
    "forgets the chunk before": ("decode", without_the_conv_state),
}


@pytest.mark.parametrize("lie", names([*LIES][::3], LIES))
def test_a_mixer_that_lies_is_seen(topology, monkeypatch, lie):
    method, replacement = LIES[lie]
    monkeypatch.setattr(GatedDeltaNet, method, replacement)
    failed = []
    for check in mixers.CHECKS:
        try:
            check(topology, "G")
        except Exception:  # wrong, or it cannot even run
            failed.append(check.__name__)
    assert failed
