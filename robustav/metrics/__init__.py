"""Metrics: pure functions of scores, labels and latents."""
