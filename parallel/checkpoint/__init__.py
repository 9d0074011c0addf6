"""Checkpoints that any layout can load: written by all ranks in parallel, complete or absent, checked before use.

A folder step_00000500/ holds rank-00003.safetensors for every rank, with its ZeRO fragments of float32 master weights
and optimizer states and the fast weights that its sequences carry, and manifest.json, which lists where everything is
and the size and SHA-256 of every file. writer.py writes, manifest.py finds and checks, reader.py reassembles.
"""
