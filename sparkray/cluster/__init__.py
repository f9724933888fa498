"""Ray's shared ground: starting and ending a local cluster, launching nodes, metrics."""
