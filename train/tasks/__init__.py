"""Synthetic tasks that need several steps of reasoning over evicted context. Nothing here imports torch.

A task is a section of sizes with: vocab_size; sequence_length (T); context_length, the tokens before the answer window;
window, the L that fits; sample(rng, held_out); and surface_guesses(sample), guesses that a reader can make who works
nothing out, by name: the best of them is a depth's floor (train/evaluation/floors.py). Token 0 is the pad in every task.
"""

from powernap.train.tasks.depo import Depo
from powernap.train.tasks.gsm import Gsm
from powernap.train.tasks.rule110 import Rule110

TASKS = {"depo": Depo, "gsm": Gsm, "rule110": Rule110}
