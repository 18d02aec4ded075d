"""The README does what it says: its first example and its first command run as written."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from robustav.cli import main as cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST = "\n".join(README.splitlines()[:20])


def test_the_first_example_is_a_whole_evaluation(tmp_path, monkeypatch, capsys):
    """As written, but on a few clips."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", FIRST, re.DOTALL)
    exec(compile(code.replace("limit=50", "limit=12"), "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert out.startswith("# Robustness report")
    assert "| pgd | both |" in out
    assert "4/255" in out


def test_the_first_command_prints_a_report(tmp_path, monkeypatch, capsys):
    """As written, but for the installation before it, on a few clips."""
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^    pip install -c constraints.txt \. && (robustav .*)$", FIRST, re.MULTILINE)
    monkeypatch.setattr(sys, "argv", [*shlex.split(line), "--limit", "6"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr().out
    assert not ended.value.code
    for attacked in ("audio", "visual", "both"):
        for condition in ("noise", "fgsm", "apgd", "apgd-dlr", "+ aimed", "+ fmn", "+ square", "worst case"):
            assert re.search(rf"^{re.escape(condition)} +{attacked} ", out, re.MULTILINE)


def test_the_test_command_is_there():
    assert re.search(r"^    pip install -c constraints.txt -e '\.\[test\]' && pytest$", README, re.MULTILINE)


def test_the_example_of_an_own_model_wraps_one(tmp_path, monkeypatch):
    """With a network in place of the dots."""
    (code,) = re.findall(r"```python\n(# my_model.py.*?)```", README, re.DOTALL)
    code = code.replace("network = ...  # any nn.Module, weights loaded", "network = Tiny()").replace(", ...),", "),")
    assert "Tiny()" in code
    names: dict = {}
    tiny = "import torch\nclass Tiny(torch.nn.Module):\n    def forward(self, audio, visual):\n        return audio[:, :2] + visual[:, 0, 0, 0, :2]\n"
    exec(compile(tiny + code, "README.md", "exec"), names)
    import torch

    model = names["make"]()
    assert model({"audio": torch.zeros(1, 160_000), "visual": torch.zeros(1, 10, 3, 224, 224)}).shape == (1, 2)


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
