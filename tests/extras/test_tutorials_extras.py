"""The tutorials on models of transformers and timm do what they say."""

import pytest
from tutorials import Tutorial, rows

from robustav.models.hugging_face import ARCHITECTURES

ATTACKED = {("clean", "-"), ("worst", "case")}


@pytest.mark.extra("transformers")
def test_hugging_face(tmp_path, monkeypatch, capsys):
    tutorial = Tutorial("hugging-face.md", tmp_path, monkeypatch, capsys)
    tutorial.check_page()
    _, printed, shown = tutorial.run()
    (table,) = shown.values()
    assert printed.startswith("multilabel InputSpec(shape=(32000,)")
    assert ATTACKED | {("noise", "audio"), ("pgd", "audio")} <= set(rows(table))
    listed = tutorial.text.replace(" v2", "v2").replace("-", "").casefold()
    assert all(name.partition("For")[0].removesuffix("Model").casefold() in listed for name in ARCHITECTURES)


@pytest.mark.extra("timm")
def test_timm(tmp_path, monkeypatch, capsys):
    tutorial = Tutorial("timm.md", tmp_path, monkeypatch, capsys)
    tutorial.check_page()
    _, printed, shown = tutorial.run()
    (table,) = shown.values()
    assert printed == "(1, 3, 168, 168) of which the network sees (160, 160)\n"
    assert ATTACKED | {("noise", "visual"), ("pgd", "visual")} <= set(rows(table))
