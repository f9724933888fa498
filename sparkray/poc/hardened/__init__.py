"""The hardened proof: integer arithmetic from end to end, so a proof is the same bits everywhere.

int8 x int8 -> int32 products with power-of-two requantisation, and integer or table-based norm, softmax,
rotation and activation: no result depends on the order of a sum, so verification is equality. Every block replaces
what it was given instead of adding a thousandth to it, so no block can be left out.
"""
