"""The command line as a stranger meets it: results on standard output, one sentence for bad input, exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from robustav.cli import main as cli
from robustav.models.zoo import MODELS

QUICK = ["attack", "--model", "visual-cnn", "--limit", "24", "--attacks", "noise,fgsm", "--eps", "4/255"]


@pytest.fixture
def invoke(monkeypatch, capsys, tmp_path):
    """Run the console script in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["robustav", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def test_the_main_job_prints_a_report_and_keeps_the_run(invoke, tmp_path):
    code, out, err = invoke(*QUICK)
    assert code == 0, err
    for word in (
        "visual-cnn",
        "clean",
        "noise",
        "fgsm",
        "worst case",
        "4/255 = 0.0156863 pixel value",
        "audit",
        "passed",
    ):
        assert word in out
    (run,) = (tmp_path / "runs").iterdir()
    assert f"kept in {run.relative_to(tmp_path)}" in err
    assert (run / "run.json").is_file()
    again = invoke(*QUICK)
    assert again[1] == out, "the same command finds its own answer"


def test_a_report_is_read_from_the_run_in_every_format(invoke):
    assert invoke(*QUICK, "--out", "r")[0] == 0
    for option, start in (("md", "# Robustness report"), ("tex", "% model"), ("csv", "run,condition"), ("json", "{")):
        code, out, _ = invoke("report", "r", "--format", option)
        assert (code, out.startswith(start)) == (0, True)
    whole = json.loads(invoke("report", "r", "--json")[1])
    assert [row["condition"] for row in whole["rows"]] == ["clean", "noise", "fgsm", "worst case"]
    assert whole["audit"] == "passed"


def test_json_of_attack_is_json_alone(invoke):
    code, out, _ = invoke(*QUICK, "--json")
    assert code == 0
    assert json.loads(out)["rows"][0]["clips"] == 24


def test_figures_are_named_on_standard_error(invoke, tmp_path):
    code, _, err = invoke(*QUICK, "--out", "r", "--figures", "--keep", "1")
    assert code == 0
    for name in re.findall(r"drew (\S+)", err):
        assert (tmp_path / name).is_file()
    assert err.count("drew") == 3


def test_shards_make_one_run(invoke):
    for shard in ("0/2", "1/2"):
        code, out, err = invoke(*QUICK, "--limit", "70", "--out", "r", "--shard", shard)
        assert (code, out) == (0, "")
        assert f"shard {shard} done" in err
    assert json.loads(invoke("report", "r", "--json")[1])["rows"][0]["clips"] == 70


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "no model 'resnet': did you mean"),
        (["--eps", "a lot"], "epsilon must be a number or a fraction such as 4/255, got 'a lot'"),
        (["--eps", "audio=0.1", "--model", "visual-cnn"], "but the model's modalities are ['visual']"),
        (["--data", "nowhere.csv"], "no data 'nowhere.csv': give av-events, a manifest"),
        (["--data", "av-events/trial"], "av-events has the splits train, validation, test, got 'trial'"),
        (["--attacks", "pgd,magic"], "no attack 'magic': there are noise, fgsm, pgd, momentum, apgd"),
        (
            ["--attacked", "smell"],
            "cannot attack 'smell': the model's modalities are audio, visual (together: joined by +",
        ),
        (["--attacks", "fgsm", "--restarts", "3"], "`restarts` has no meaning for fgsm: leave it out"),
        (["--attacks", "fgsm,noise", "--steps", "3"], "`steps` has no meaning for fgsm, noise"),
        (["--attacks", ""], "no attack ''"),
        (["--goal", "hide:gong"], "no class 'gong'; the model has string, bell"),
        (["--norm", "l7"], "`norm` must be one of ['l1', 'l2', 'linf'], got 'l7'"),
        (["--norm", "linf", "--eps", "30dB"], "goes with norm 'l2', got 30.0 with 'linf'"),
        (["--checkpoint", "w.pt"], "checkpoint 'w.pt' is not a file"),
        (["--threshold", "2"], "`threshold` must be a probability between 0 and 1"),
        (["--device", "toaster"], "`device` must be 'auto', 'cpu' or a CUDA device that is there, got 'toaster'"),
        (["--batch-size", "many"], "must be auto or a number from 1"),
        (["--shard", "4/4"], "must be I/N with I from 0 to N - 1"),
        (["--format", "docx"], "must be one of md, tex, csv, json"),
        (["--steps", "0"], "greater than or equal to 1"),
        (["--what"], "No such option"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(invoke, arguments, message):
    code, out, err = invoke("attack", *arguments)
    assert (code, out) == (2, "")
    assert message in re.sub(r"[\s\u2502]+", " ", err)
    assert "Traceback" not in err


def test_features_are_attacked_by_the_models_name(invoke):
    plain = json.loads(invoke(*QUICK, "--json")[1])
    raw, features = QUICK[2], f"{QUICK[2]}(at=features)"
    code, out, err = invoke(*(features if word == raw else word for word in QUICK), "--json")
    assert code == 0, err
    seen = json.loads(out)
    assert seen["rows"][0]["mAP"] == pytest.approx(plain["rows"][0]["mAP"]), "the same clips, clean"
    assert seen["rows"][2]["mAP"] != plain["rows"][2]["mAP"]
    assert any("visual features, not recordings" in note for note in seen["notes"])
    assert not any("not recordings" in note for note in plain["notes"])
    assert "0.0156863 feature" in json.dumps(seen)


def test_reports_of_what_is_no_run(invoke):
    code, _, err = invoke("report", "elsewhere")
    assert code == 2
    assert "elsewhere is no run: it has no run.json" in err


def test_a_failed_audit_is_exit_1(invoke, tmp_path):
    (tmp_path / "liar.py").write_text(
        "import torch\nfrom robustav.models.zoo import load_model\n"
        "from robustav.classifier import Wrapped\n"
        "def make():\n"
        "    model, _ = load_model('visual-cnn')\n"
        "    noisy = lambda net, x: net(x) + torch.randn(len(x['visual']), len(model.classes))\n"
        "    return Wrapped(model, specs=model.specs, classes=model.classes, label_kind='multilabel', call=noisy)\n"
    )
    code, out, err = invoke(*QUICK, "--model", "liar.py:make")
    assert code == 1
    assert "not valid" in out
    assert "the audit failed" in err


def test_the_lists(invoke):
    code, out, _ = invoke("models")
    assert code == 0
    assert all(name in out for name in MODELS)
    code, out, _ = invoke("models", "av-fusion")
    assert "[32000] at 16000 Hz, amplitude in [-1, 1]" in out
    assert "AdamW" in out
    assert json.loads(invoke("models", "av-fusion", "--json")[1])["label_kind"] == "multilabel"
    assert len(json.loads(invoke("models", "--json")[1])) == len(MODELS)
    assert "av-events" in invoke("data")[1]
    assert invoke("models", "nope")[0] == 2
    code, _, err = invoke("data", "nope")
    assert (code, "no data 'nope': there is av-events" in err) == (2, True)
    assert "robustav 0." in invoke("--version")[1]


def test_help_names_every_command(invoke):
    code, out, _ = invoke("--help")
    assert code == 0
    assert all(name in out for name in ("attack", "report", "models", "data"))


def test_completion_knows_the_models_without_importing_torch():
    code = (
        "import sys; from robustav.cli.shared import models_by_name; print(models_by_name('av')); "
        "sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.strip() == "['av-early', 'av-fusion', 'av-mid']"
    assert set(cli.models_by_name("")) == set(MODELS), "robustav/models/names.txt lists every model"
    assert cli._attacks("m") == ["momentum", "mla-lp"]


@pytest.fixture
def manifest(clips_folder, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "clips.csv").write_text(
        "id,path,labels\n"
        f"whistle,{clips_folder / '00W1lcxW-WU_40.000.mp4'},Whistle\n"
        f"shaver,{clips_folder / 'KlsG1EnBEjc_000361.mp4'},\n"
        f"hammer,{clips_folder / 'BfvyPmVMo_20.000.wav'},Hammer\n"
        "empty,empty.mp4,bell\n"
    )
    return "clips.csv"


def test_real_clips_are_attacked_and_what_cannot_be_used_is_said(invoke, manifest):
    code, out, err = invoke(
        "attack", "--model", "av-fusion", "--suite", "quick", "--data", manifest, "--keep", "1", "--out", "r"
    )
    assert code == 0, err
    text = " ".join(out.split())
    assert "2 of 4 clips (2 skipped)" in text
    assert "no video track, and the model needs visual" in text
    assert "2 of 2 clips have no usable label" in text
    assert "Label 'Whistle' (1 clip) is no class of the model" in text
    whole = json.loads(invoke("report", "r", "--json")[1])
    assert {row["sample"] for row in whole["skipped"]} == {"hammer", "empty"}
    strongest = next(r for r in whole["rows"] if r["condition"] == "apgd" and r["attacked"] == "audio+visual")
    assert 0 < strongest["max_abs_audio"] <= 0.01
    assert 0 < strongest["max_abs_visual"] <= 0.01
    assert list(Path("r/kept").glob("apgd-audio+visual-0/*/audio.wav"))
    assert len(list(Path("r/kept").glob("apgd-audio+visual-0/*/visual-*.png"))) == 4


def test_an_ear_alone_hears_all_three_recordings(invoke, manifest):
    code, out, err = invoke("attack", "--model", "audio-cnn", "--data", manifest, "--attacks", "fgsm", "--json")
    assert code == 0, err
    assert json.loads(out)["rows"][0]["clips"] == 3


def test_strict_stops_at_the_first_bad_clip(invoke, manifest):
    code, out, err = invoke("attack", "--data", manifest, "--strict")
    assert (code, out) == (2, "")
    assert "clip 'hammer' cannot be used: no video track" in err


def test_data_check_says_what_would_be_skipped(invoke, manifest):
    code, out, _ = invoke("data", "check", manifest)
    assert code == 0
    assert "2 of 4 clips can be used with av-fusion" in out
    assert "'Whistle' (1), 'Hammer' (1)" in out
    facts = json.loads(invoke("data", "check", manifest, "--model", "audio-cnn", "--json")[1])
    assert (facts["clips"], facts["usable"]) == (4, 3)
    assert list(facts["skipped"]) == ["empty"]


def test_no_usable_clip_is_an_error_with_the_reasons_on_paper(invoke, tmp_path):
    (tmp_path / "silence.mp4").write_bytes(b"nothing")
    code, out, err = invoke("attack", "--data", "silence.mp4")
    assert code == 2
    assert "silence" in out
    assert "no clip could be used" in err
    assert invoke("data", "check", "silence.mp4")[0] == 2
