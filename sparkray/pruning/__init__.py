"""REAP: watch the experts of a mixture-of-experts model, score them, cut the lowest, and check what is left.

The saliency is that of Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression"
(arXiv 2510.13999): the mean over routed tokens of gate times the norm of the expert's output.

    observe (statistics) -> plan (which experts stay) -> rewrite (bytes of the shards) -> validate
"""
