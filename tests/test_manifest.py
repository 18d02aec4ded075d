"""Manifests as people write them, and the clips that come of them."""

import csv
import hashlib
import json
import shutil
import wave
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from robustav.classifier import InputSpec, frames, waveform
from robustav.data.clips import Clips
from robustav.data.manifest import Entry, read_manifest
from robustav.data.samples import SkippedError
from robustav.fbank import Fbank
from robustav.mel import END
from robustav.training.data import packed, unpacked

BOTH = {"audio": waveform(1), "visual": frames(2, 16)}
CLASSES = ("Speech", "Male speech, man speaking", "Whistle", "Music")


def write_tone(path: Path, seconds: float, hertz: float = 300) -> Path:
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * 16_000)) / 16_000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((tone[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux([*stream.encode(frame), *stream.encode(None)])
    return path


def write_pictures(path: Path, levels: list[int]) -> Path:
    """One grey picture every tenth of a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        for level in levels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    return path


def listed(tmp_path: Path, text: str, name: str = "list.csv") -> list[Entry]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_manifest(tmp_path / name)


def test_a_table_with_every_column(tmp_path: Path):
    text = (
        "id, path,audio,frames,start,end,Labels\n"
        'a,videos/a.mp4,,,1.5,3,"Male speech, man speaking;Whistle"\n'
        "\n"
        "b,,sounds/b.wav,frames/b,,, Music | Speech |\n"
        "c,c.mp4,,,,,\n"
        "d,d.mp4,,,,,;\n"
    )
    assert listed(tmp_path, text) == [
        Entry("a", tmp_path / "videos/a.mp4", start=1.5, end=3.0, labels=(CLASSES[1], "Whistle"), line=2),
        Entry("b", None, tmp_path / "sounds/b.wav", tmp_path / "frames/b", labels=("Music", "Speech"), line=4),
        Entry("c", tmp_path / "c.mp4", line=5),
        Entry("d", tmp_path / "d.mp4", labels=(), line=6),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_ids_come_from_stems_whatever_the_editor(tmp_path: Path, encoding: str, newline: str):
    text = newline.join(["path,labels", "Größe.mp4,Speech", "/elsewhere/-x.y.mp4,"])
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    entries = read_manifest(tmp_path / "list.csv")
    assert [entry.id for entry in entries] == ["Größe", "-x.y"]
    assert entries[1].path == Path("/elsewhere/-x.y.mp4")


def test_lines_of_json_and_tabs_say_the_same_as_a_table(tmp_path: Path):
    rows = [{"path": "a.mp4", "start": 1, "labels": ["Music", "Speech"]}, {"audio": "b.wav", "labels": None}]
    by_json = listed(tmp_path, "\n".join(map(json.dumps, rows)), "list.jsonl")
    by_tabs = listed(tmp_path, "path\taudio\tstart\tlabels\na.mp4\t\t1\tMusic;Speech\n\tb.wav\t\t\n", "list.tsv")
    assert [entry.labels for entry in by_json] == [("Music", "Speech"), None]
    assert [(e.id, e.path, e.audio, e.start, e.labels) for e in by_json] == [
        (e.id, e.path, e.audio, e.start, e.labels) for e in by_tabs
    ]
    assert listed(tmp_path, '{"id": 7, "path": "a.mp4", "labels": []}\n', "list.json")[0].labels == ()


def test_a_folder_and_a_single_file(tmp_path: Path):
    for name in ("b.MP4", "deep/b.wav", "deep/a.wav", "deep/a.mp4", "notes.txt", "._b.mp4", ".trash/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [entry.id for entry in read_manifest(tmp_path)] == ["b", "deep/a.mp4", "deep/a.wav", "deep/b"]
    assert read_manifest(tmp_path / "b.MP4") == [Entry("b", tmp_path / "b.MP4")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list.csv: the manifest lists no clips"),
        ("path,labels\n\n", "list.csv: the manifest lists no clips"),
        ("path,colour\na.mp4,red", "line 1: the first row must name columns among id, path, .*, got also 'colour'"),
        ("a.mp4,Speech\nb.mp4,Music", "line 1: the first row must name columns .* got also 'a.mp4', 'speech'"),
        ("path,path\na.mp4,b.mp4", "line 1: columns must differ, got path more than once"),
        ("path,labels\na.mp4,Male speech, man speaking", "line 2: must have 2 cells .* got 3; a cell with a ','"),
        ("path,labels\na.mp4", "line 2: must have 2 cells as the header has, got 1"),
        ('path,labels\na.mp4,"Speech', "line 2: cannot be read as a table"),
        ("path,labels\n,Speech", "line 2: a clip needs a path, an audio file, a folder of frames or features"),
        ("path\nx/a.mp4\nb.mp4\ny/a.mp4", "line 4, column id: ids must differ, got 'a' as on line 2"),
        ("path,start\na.mp4,soon", "line 2, column start: must be a number of seconds, 0 or more, got 'soon'"),
        ("path,start\na.mp4,-1", "line 2, column start: must be .* 0 or more, got '-1'"),
        ("path,end\na.mp4,nan", "line 2, column end: must be a number of seconds, 0 or more, got 'nan'"),
        ("path,start,end\na.mp4,5,5", "line 2, column end: must be after the start at 5 s, got '5'"),
        ("path,end\na.mp4,0", "line 2, column end: must be after the start at 0 s, got '0'"),
    ],
)
def test_mistakes_in_a_table(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        listed(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a.mp4"', 'line 1: must be one JSON object a line, got \'{"path": "a.mp4"\''),
        ('[{"path": "a.mp4"}]', "line 1: must be one JSON object a line, got a list"),
        ('{"path": "a.mp4"}\n\n{"wav": "b.wav"}', "line 3: keys must be among id, path.*, got also 'wav'"),
        ('{"path": 3}', "line 1, column path: must be a path, got 3"),
        ('{"path": " "}', "line 1, column path: must be a path, got ' '"),
        ('{"path": "a.mp4", "start": true}', "line 1, column start: must be a number of seconds, 0 or more, got True"),
        ('{"path": "a.mp4", "end": Infinity}', "line 1, column end: must be a number of seconds"),
        ('{"path": "a.mp4", "labels": "Speech"}', "line 1, column labels: must be a list of names, got 'Speech'"),
        ('{"path": "a.mp4", "labels": [1]}', r"line 1, column labels: must be a list of names, got \[1\]"),
        ('{"path": "a.mp4", "id": ["a"]}', r"line 1, column id: must be a name, got \['a'\]"),
    ],
)
def test_mistakes_in_json(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        listed(tmp_path, text, "list.jsonl")


def test_things_that_are_no_manifest(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no such manifest, folder or clip: .*gone.csv"):
        read_manifest(tmp_path / "gone.csv")
    with pytest.raises(ValueError, match=r"no media file in the folder, looked for .3gp, .aac"):
        read_manifest(tmp_path)
    (tmp_path / "list.xlsx").touch()
    with pytest.raises(ValueError, match=r"must end in .csv, .json, .* a clip in one of .*, got '.xlsx'"):
        read_manifest(tmp_path / "list.xlsx")
    (tmp_path / "list.csv").write_bytes("path\na.mp4\nGröße.mp4".encode("latin-1"))
    with pytest.raises(ValueError, match="line 3: must be UTF-8 text, got byte 0xF6"):
        read_manifest(tmp_path / "list.csv")


def test_labels_by_name_case_alias_and_list(tmp_path: Path):
    entries = [
        Entry("exact", labels=("Male speech, man speaking",)),
        Entry("case", labels=("WHISTLE", "music")),
        Entry("alias", labels=("/m/09x0r", "402")),
        Entry("commas", labels=("/m/09x0r,Music",)),
        Entry("partly", labels=("Speech", "Zither", "Zither")),
        Entry("unknown", labels=("Zither", "Bird, bird call")),
        Entry("nothing", labels=()),
        Entry("unlabelled"),
    ]
    aliases = {"/m/09x0r": "Speech", "402": "whistle", "/m/zither": "Zither"}
    clips = Clips(entries, BOTH, CLASSES, aliases=aliases)
    targets = [clips.labels(index) for index in range(len(entries))]
    expected = [[0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0], None, [0, 0, 0, 0], None]
    assert [None if target is None else target.tolist() for target in targets] == expected
    assert clips.unknown_labels == {"Zither": ["partly", "unknown"], "Bird, bird call": ["unknown"]}


def test_classes_that_differ_in_case_only():
    clips = Clips([Entry("a", labels=("A",)), Entry("b", labels=("a",))], BOTH, ("a", "A"), "multiclass")
    assert [clips.labels(0).item(), clips.labels(1).item()] == [1, 0]


def test_multiclass_needs_exactly_one_label(tmp_path: Path):
    write_tone(tmp_path / "a.wav", 1)
    sets = [("Music",), ("Music", "Whistle"), (), ("Zither",), ("Music", "Zither")]
    entries = [Entry(str(n), tmp_path / "a.wav", labels=labels) for n, labels in enumerate(sets)]
    clips = Clips(entries, {"audio": waveform(1)}, CLASSES, "multiclass")
    assert clips.load(0).labels.item() == clips.load(4).labels.item() == 3
    assert clips.load(3).labels is None
    with pytest.raises(SkippedError, match="exactly one label, got 'Whistle', 'Music'"):
        clips.load(1)
    with pytest.raises(SkippedError, match="exactly one label, got none"):
        clips.load(2)


def test_sound_is_cut_or_padded_to_the_model(tmp_path: Path):
    write_tone(tmp_path / "a.wav", 1.5)
    entries = [Entry("whole", tmp_path / "a.wav"), Entry("end", tmp_path / "a.wav", start=1.25)]
    entries += [Entry("within", tmp_path / "a.wav", start=0.5, end=0.75)]
    clips = Clips(entries, {"audio": waveform(1)}, CLASSES)
    whole, end, within = (clips.load(index) for index in range(3))
    assert whole.inputs["audio"].shape == (16_000,) and whole.signal == {}
    for sample in (end, within):
        assert sample.inputs["audio"].shape == (16_000,)
        assert sample.inputs["audio"][4_000:].abs().max() == 0
        assert sample.signal["audio"].dtype == torch.bool
        assert sample.signal["audio"].tolist() == [True] * 4_000 + [False] * 12_000
        torch.testing.assert_close(sample.inputs["audio"][:4_000].abs().max(), torch.tensor(0.5), rtol=0, atol=1e-3)
    BOTH["audio"].check("audio", end.inputs["audio"][None])


def test_a_recording_that_ends_in_silence_is_no_shorter_clip(tmp_path: Path):
    """Its silence is analysed as the official front ends do, not filled up; the least sound there changes nothing."""
    write_tone(tmp_path / "a.wav", 1.0)
    with wave.open(str(tmp_path / "a.wav")) as file:
        settings, tone = file.getparams(), file.readframes(file.getnframes())
    silence = bytes(len(tone))
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setparams(settings)
        file.writeframes(tone + silence)
    clips = Clips([Entry("b", tmp_path / "b.wav")], {"audio": waveform(2)}, CLASSES)
    audio = clips.load(0).inputs["audio"]
    assert audio[-1] == END and audio[16_400:-1].abs().max() == 0
    spec = {"audio": waveform(2)}
    heard = [audio, unpacked(packed(audio, spec["audio"]), spec["audio"])]  # as a training keeps it
    tail = audio.clone()
    tail[-1000] = 1e-9
    front = Fbank.published("ast")
    expected = front(tail[None])
    for x in heard:
        torch.testing.assert_close(front(x[None]), expected)
    assert (front(audio[None])[0, 110:196] < -1).all()  # the floor, not the mean, which is 0


def test_pictures_cover_the_same_time_as_the_sound(tmp_path: Path):
    write_pictures(tmp_path / "a.mkv", [50] * 10 + [200] * 10)
    write_tone(tmp_path / "a.wav", 2)
    entry = Entry("a", tmp_path / "a.mkv", tmp_path / "a.wav")
    both = Clips([entry], BOTH, CLASSES).load(0).inputs["visual"].mean((1, 2, 3))
    torch.testing.assert_close(both * 255, torch.tensor([50.0, 50.0]), rtol=0, atol=5)
    alone = Clips([entry], {"visual": BOTH["visual"]}, CLASSES).load(0).inputs["visual"].mean((1, 2, 3))
    torch.testing.assert_close(alone * 255, torch.tensor([50.0, 200.0]), rtol=0, atol=5)


def test_a_track_that_the_model_needs(tmp_path: Path):
    write_pictures(tmp_path / "mute.mkv", [50] * 10)
    write_tone(tmp_path / "blind.wav", 1)
    no_sound, no_picture = "no audio track, and the model needs audio", "no video track, and the model needs visual"
    entries = {
        Entry("mute", tmp_path / "mute.mkv"): no_sound,
        Entry("blind", tmp_path / "blind.wav"): no_picture,
        Entry("sound", audio=tmp_path / "blind.wav"): no_picture,
        Entry("pictures", frames=tmp_path): no_sound,
        Entry("gone", tmp_path / "gone.mp4"): "file missing: .*gone.mp4",
        Entry("folder", tmp_path / "blind.wav", frames=tmp_path / "gone"): "folder of frames missing",
    }
    clips = Clips(list(entries), BOTH, CLASSES)
    for index, reason in enumerate(entries.values()):
        with pytest.raises(SkippedError, match=reason):
            clips.load(index)
    assert Clips(list(entries), {"audio": waveform(1)}, CLASSES).load(1).inputs.keys() == {"audio"}


def test_specs_that_clips_cannot_meet():
    bad = {
        "must name modalities among audio, visual, got none": {},
        "must name modalities among audio, visual, got 'text'": {"text": waveform(1)},
        r"`specs\['audio'\]` must have the shape \(time,\)": {"audio": InputSpec((2, 9), -1, 1, "amplitude", 8_000)},
        r"`specs\['visual'\]` must have the shape .* got \(2, 1, 8, 8\)": {"visual": InputSpec((2, 1, 8, 8), 0, 1, "")},
        r"`specs\['visual'\]` must span \[0, 1\].* got \[0, 255\]": {"visual": InputSpec((2, 3, 8, 8), 0, 255, "")},
        "must have a sample rate in Hz, got None": {"audio": InputSpec((9,), -1, 1, "amplitude")},
    }
    for message, specs in bad.items():
        with pytest.raises(ValueError, match=message):
            Clips([], specs, CLASSES)
    with pytest.raises(ValueError, match="must have different ids, got 'a' more than once"):
        Clips([Entry("a"), Entry("a")], BOTH, CLASSES)


def test_the_digest_follows_content_not_place(tmp_path: Path):
    (tmp_path / "one").mkdir()
    write_tone(tmp_path / "one/a.wav", 1)
    write_pictures(tmp_path / "one/b.mkv", [50] * 3)
    (tmp_path / "one/list.csv").write_text("path,labels,start\na.wav,Music,\nb.mkv,,0\ngone.mp4,,\n")
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def digest(folder: str) -> str:
        return Clips(read_manifest(tmp_path / folder / "list.csv"), BOTH, CLASSES).digest

    first = digest("one")
    assert len(first) == len(hashlib.sha256().hexdigest()) and digest("two") == first
    changes = {"list.csv": b"path,labels,start\na.wav,Speech,\nb.mkv,,0\ngone.mp4,,\n", "b.mkv": b"x", "gone.mp4": b""}
    seen = {first}
    for name, content in changes.items():
        (tmp_path / "two" / name).write_bytes(content)
        seen.add(digest("two"))
    write_tone(tmp_path / "two/a.wav", 1, hertz=301)
    seen.add(digest("two"))
    assert len(seen) == 5


def test_loading_from_threads_gives_the_same(clips_folder: Path):
    entries = [entry for entry in read_manifest(clips_folder) if entry.path.suffix == ".mp4"] * 4
    entries = [Entry(str(n), entry.path, start=n / 2) for n, entry in enumerate(entries)]
    clips = Clips(entries, BOTH, CLASSES)
    alone = [clips.load(index) for index in range(len(entries))]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(clips.load, range(len(entries))))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one.inputs[modality], other.inputs[modality]) for modality in BOTH)


def test_real_clips_under_audioset_labels(clips_folder: Path, tmp_path: Path):
    with (clips_folder / "class_labels_indices.csv").open() as file:
        rows = list(csv.DictReader(file))
    classes = [row["display_name"] for row in rows]
    aliases = {row[column]: row["display_name"] for row in rows for column in ("mid", "index")}
    text = (
        f"path,labels\n{clips_folder}/00W1lcxW-WU_40.000.mp4,/m/0l156k\n"
        f"{clips_folder}/KlsG1EnBEjc_000361.mp4,\n{clips_folder}/BfvyPmVMo_20.000.wav,419\n"
    )
    specs = {"audio": waveform(10.24), "visual": frames(4, 32)}
    clips = Clips(listed(tmp_path, text), specs, classes, aliases=aliases)
    whistle, shaver = clips.load(0), clips.load(1)
    assert [classes[index] for index in whistle.labels.nonzero()] == ["Whistle"] and shaver.labels is None
    for sample in (whistle, shaver):
        for modality, spec in specs.items():
            spec.check(modality, sample.inputs[modality][None])
        assert 9.9 < sample.signal["audio"].sum() / 16_000 < 10.1
    with pytest.raises(SkippedError, match="no video track, and the model needs visual"):
        clips.load(2)
    hammer = Clips(clips.entries, {"audio": specs["audio"]}, classes, aliases=aliases).load(2)
    assert [classes[index] for index in hammer.labels.nonzero()] == ["Hammer"]


FED = {"audio": waveform(1), "visual": InputSpec((10, 4), 0.0, float("inf"), "feature")}


def test_features_are_read_from_files(tmp_path: Path):
    write_tone(tmp_path / "a.wav", 1)
    np.save(tmp_path / "a.npy", np.arange(40, dtype=np.float64).reshape(10, 4))
    entries = listed(tmp_path, "id,audio,visual_features,labels\na,a.wav,a.npy,Music\n")
    clips = Clips(entries, FED, CLASSES)
    sample = clips.load(0)
    assert torch.equal(sample.inputs["visual"], torch.arange(40.0).reshape(10, 4))
    assert sample.inputs["audio"].shape == (16_000,)
    before = clips.digest
    np.save(tmp_path / "a.npy", np.zeros((10, 4)))
    assert Clips(entries, FED, CLASSES).digest != before
    alone = listed(tmp_path, "visual_features\na.npy\n")
    assert alone[0].id == "a"
    assert set(Clips(alone, {"visual": FED["visual"]}, CLASSES).load(0).inputs) == {"visual"}


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 10)), r"a.npy must hold numbers of shape \[10, 4\], got \[4, 10\] of float64"),
        (np.full((10, 4), "x"), r"got \[10, 4\] of <U1"),
        (np.full((10, 4), -1.0), r"must lie in \[0, inf\], got values from -1 to -1"),
        (np.full((10, 4), np.nan), r"got values from nan"),
        (np.full((10, 4), None), r"a.npy is no .npy file of numbers \(pickled objects are not read\)"),
        (None, r"a.npy is no .npy file of numbers"),
    ],
)
def test_features_that_cannot_be_used(array: np.ndarray | None, reason: str, tmp_path: Path):
    if array is None:
        (tmp_path / "a.npy").write_bytes(b"no array")
    else:
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
    clips = Clips(listed(tmp_path, "visual_features\na.npy\n"), {"visual": FED["visual"]}, CLASSES)
    with pytest.raises(SkippedError, match=reason):
        clips.load(0)


def test_features_that_are_missing(tmp_path: Path):
    clips = Clips(listed(tmp_path, "visual_features\nb.npy\n"), {"visual": FED["visual"]}, CLASSES)
    with pytest.raises(SkippedError, match=r"no such file: b.npy"):
        clips.load(0)
    clips = Clips(listed(tmp_path, "path\na.mp4\n"), {"visual": FED["visual"]}, CLASSES)
    with pytest.raises(
        SkippedError, match=r"no visual_features, and the model reads visual features of shape \[10, 4\]"
    ):
        clips.load(0)
