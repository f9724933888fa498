"""Parallel thinking: many paths for one question, pruned while they are written, and a vote over their answers.

The core is read and tested without an engine: a policy sees lanes grow and decides. `replay` runs a policy on
recorded paths, `vllm_live` runs it on an engine.
"""
