"""Proof of compute: nonces through a model that a block hash seeds, and the proofs that come of it."""
