"""Checkpoints that any layout can load: written by all ranks at once, complete or not there, checked before they are used.

A folder step_00000500/ holds rank-00003.safetensors for every rank, with the fragments of float32 master weights and
optimizer states that ZeRO gave it and the fast weights that its sequences carry, and manifest.json, which says what is where
and has size and SHA-256 of every file. writer.py writes, manifest.py finds and checks, reader.py puts together.
"""
