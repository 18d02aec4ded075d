"""Latent geometry of a classifier: where to cut it, what its latents measure, and whether that predicts robustness."""
