"""`robustav metrics`: what it prints, in which formats, and what bad input gets."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from robustav.cli.main import app

runner = CliRunner()
QUICK = [
    "--model",
    "visual-cnn",
    "--limit",
    "120",
    "--layers",
    "latent",
    "--k",
    "2",
    "--spaces",
    "raw",
    "--resamples",
    "50",
]


def invoke(*arguments):
    return runner.invoke(app, ["metrics", *arguments])


@pytest.fixture(scope="module")
def density(tmp_path_factory):
    out = tmp_path_factory.mktemp("density")
    result = invoke("density", *QUICK, "--out", str(out))
    assert result.exit_code == 0, result.output
    return result, out


def test_density_prints_every_class_and_the_macro_mean(density):
    result, _ = density
    assert "relative density (raw, k=2)" in result.stdout
    for name in ("string", "warble", "macro mean", "hubness", "local dimension"):
        assert name in result.stdout
    assert "120 of 1000 clips" in result.stdout


def test_out_holds_every_format_and_the_figures(density):
    _, out = density
    assert {file.name for file in out.iterdir()} == {
        "report.md", "report.tex", "report.csv", "report.json", "by-layer.png", "map-latent.png",
    }  # fmt: skip
    rows = pd.read_csv(out / "report.csv")
    assert set(rows["model"]) == {"visual-cnn"}
    known = rows[rows["value"].notna() & rows["low"].notna()]
    assert (known["low"] <= known["high"]).all()
    assert len(rows[rows["metric"] == "relative density"]) == 11


def test_formats_carry_the_same_numbers(density):
    _, out = density
    whole = json.loads((out / "report.json").read_text())
    rows = pd.read_csv(out / "report.csv")
    (value,) = rows.query("metric == 'relative density' and `class` == 'bell'")["value"]
    (same,) = (r["value"] for r in whole["rows"] if r["metric"] == "relative density" and r["class"] == "bell")
    assert value == pytest.approx(same)
    assert f"{value:.3f}" in (out / "report.md").read_text()
    assert f"{value:.3f}" in (out / "report.tex").read_text()


def test_the_same_command_prints_the_same(density):
    result, _ = density
    again = invoke("density", *QUICK)
    assert again.stdout == result.stdout


def test_a_sweep_over_k():
    result = invoke("density", *QUICK[:6], "--k", "2,4", *QUICK[8:], "--format", "csv")
    assert result.exit_code == 0, result.output
    assert {"k=2", "k=4"} <= {line.split(",")[5] for line in result.stdout.splitlines()}


def test_convexity_of_a_linear_head_is_one_where_it_is_conditional():
    result = invoke("convexity", *QUICK[:6], "--pairs", "40", "--k", "2", "--resamples", "50", "--json")
    assert result.exit_code == 0, result.output
    rows = [
        r
        for r in json.loads(result.stdout)["rows"]
        if r["metric"] == "conditional convexity" and r["value"] is not None
    ]
    assert rows
    assert all(row["value"] == 1 for row in rows)


def test_all_has_both():
    result = invoke("all", *QUICK, "--pairs", "20")
    assert result.exit_code == 0, result.output
    assert "relative density" in result.stdout
    assert "soft convexity" in result.stdout


def test_adversarial_latents_lie_elsewhere_than_clean_ones(tmp_path):
    attack = ["attack", "--model", "visual-cnn", "--limit", "60", "--attacks", "fgsm", "--eps", "0.05", "--keep", "60"]
    assert runner.invoke(app, [*attack, "--out", str(tmp_path / "run")]).exit_code == 0
    result = invoke("density", *QUICK[:2], *QUICK[4:], "--adversarial", str(tmp_path / "run"), "--format", "csv")
    assert result.exit_code == 0, result.output
    (tmp_path / "rows.csv").write_text(result.stdout)
    rows = pd.read_csv(tmp_path / "rows.csv")
    own = rows[
        (rows["metric"] == "density in")
        & rows["setting"].str.contains("clean of its class")
        & (rows["class"] == "macro mean")
    ]
    assert own["value"].item() < 0.9  # 1 where nothing moved


def test_another_split_is_held_against_the_surveyed_one():
    result = invoke("density", *QUICK, "--against", "av-events/validation", "--format", "csv")
    assert result.exit_code == 0, result.output
    assert "surveyed in the other clips" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["volume"], "must be one of density, convexity, all, validate, got 'volume'"),
        (["validate"], "validate needs the folders of one or more runs"),
        (["density", "somewhere"], "has no meaning for density"),
        (["convexity", "--against", "av-events/train"], "has no meaning for convexity"),
        (["density", "--target", "ap"], "has no meaning for density"),
        (["density", "--k", "ten"], "must be numbers such as 5,10"),
        (["convexity", "--sigmas", "a,b"], "must be numbers such as 0.5,1"),
        (["density", "--format", "yaml"], "must be one of md, tex, csv, json"),
        (["density", "--pairs", "9"], "has no meaning for density"),
        (["convexity", "--spaces", "raw"], "has no meaning for convexity"),
        (["density", "--out", __file__], "must be a folder"),
    ],
)  # fmt: skip
def test_wrong_usage(arguments, words):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["density", "--layers", "head.9"], "no layer 'head.9': there are input, front end, features, latent"),
        (["density", "--spaces", "curved"], "no space 'curved': there are raw, unit, whitened"),
        (["density", "--k", "1"], "`ks` must be numbers of neighbours from 2 on"),
        (["convexity", "--sigmas", "1"], "`sigmas` must be at least two rising numbers"),
        (["density", "--model", "nobody"], "no model 'nobody'"),
        (["density", "--latent", "head"], "--latent names the last module of a wrapped network"),
        (["density", "--layers", "latent", "--k", "2", "--adversarial", "nowhere"], "nowhere is no run"),
        (["density", "--layers", "latent"], "no class has enough clips: the largest has 7, and k=10 needs 50"),
        (["density", "--spaces", ","], "`spaces` must name at least one of raw, unit, whitened"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, words):
    result = invoke(*arguments, "--limit", "20")
    assert isinstance(result.exception, ValueError | FileNotFoundError)
    assert words in str(result.exception)
