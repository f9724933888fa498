"""Two tokenizers over one text: are they the same, which tokens cover the same bytes, and what that leaves to learn."""
