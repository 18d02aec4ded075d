"""The tutorial on networks of one's own does what it says."""

import sys

import pytest
import torch
from tutorials import Tutorial, rows

from robustav.classifier import Classifier


@pytest.fixture(autouse=True)
def _forget():
    """The page's modules belong to its folder."""
    yield
    for name in ("my_model", "my_fusion"):
        sys.modules.pop(name, None)


def test_own_network(tmp_path, monkeypatch, capsys):
    tutorial = Tutorial("own-network.md", tmp_path, monkeypatch, capsys)
    tutorial.check_page()
    names, _, shown = tutorial.run()
    wrapped, density = shown.values()
    assert {("clean", "-"), ("noise", "audio"), ("pgd", "audio"), ("worst", "case")} <= set(rows(wrapped))
    assert "latent" in density
    for model in ("late", "Gated"):
        table = tutorial.command(f"robustav attack --model my_fusion.py:{model} --attacks pgd --steps 3 --limit 4")
        assert {("pgd", "audio"), ("pgd", "visual"), ("pgd", "both")} <= set(rows(table))

    inputs = {m: torch.zeros(2, *spec.shape) for m, spec in names["SPECS"].items()}
    for make in ("late", "Gated"):
        assert isinstance(names[make](), Classifier)
        assert names[make]()(inputs).shape == (2, len(names["CLASSES"]))
    assert names["Gated"]().trace(inputs).latent.shape == (2, 8)
