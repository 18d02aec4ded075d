"""Experiments: a recipe (TOML), the trainings, evaluations and metrics that it names, and one report of them."""
