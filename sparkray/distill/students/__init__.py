"""Models that learn: an ordinary causal language model, and the latent pair of an autoencoder and a transformer."""
