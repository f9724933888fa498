"""Prefill here, decode there: keys and values of a prompt move between two engines while they are computed."""
