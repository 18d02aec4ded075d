"""Data: what an evaluation reads."""
