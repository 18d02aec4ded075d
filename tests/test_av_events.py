"""av-events: equal bytes everywhere, the statistics that its knobs promise, and a cache that cannot hurt."""

import hashlib
import logging
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from robustav.data.av_events import BASE, AvEvents, AvEventsConfig, Event, cache_dir, plan, scene
from robustav.data.av_looks import LOOKS
from robustav.data.av_sounds import SAMPLE_RATE, SOUNDS, UNIT, Draws, advance, fixed, sine, ticks, to_level
from robustav.data.samples import Samples

SMALL = AvEventsConfig(seconds=0.25, frames=2, frame_size=16, train=6, validation=5, test=4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROBUSTAV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def checksum(config: AvEventsConfig, split: str, indices: range) -> str:
    total = hashlib.sha256()
    for index in indices:
        made = scene(config, split, index)
        total.update(made.audio.astype("<i2").tobytes() + made.frames.tobytes())
        total.update(repr([tuple(event) for event in made.events]).encode())
    return total.hexdigest()


def plans(config: AvEventsConfig, count: int = 1500) -> list[list[Event]]:
    return [plan(config, "train", index) for index in range(count)]


def file_of(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AvEventsConfig(), "7b3e2273283561827fdfa2a541176100584c3efd6fb107a4b996db12d42e0e98"),
        (
            AvEventsConfig(
                seed=7,
                classes=100,
                imbalance=30,
                cooccurrence=0.6,
                modality_reliability=0.7,
                seconds=1.3,
                frames=3,
                frame_size=33,
            ),
            "a77f22886344ef0e289b673d51d1212c0af1987242bef57c89c4e30b8e9feeef",
        ),
    ],
    ids=["default", "other knobs"],
)
def test_the_same_bytes_on_every_machine(config: AvEventsConfig, expected: str) -> None:
    assert checksum(config, "test", range(20)) == expected


def test_philox_gives_the_published_words() -> None:
    # Known-answer test of Random123 for philox4x64-10, key and counter of ones' complement zero; NumPy counts first.
    generator = np.random.Philox(key=2**128 - 1, counter=2**256 - 2)
    words = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert generator.random_raw(4).tolist() == words


def test_tables_refuse_a_rounding_tie() -> None:
    with pytest.raises(AssertionError):
        fixed(lambda k: k / 2, 2, 1)


def test_sine_and_pitch_are_right_to_their_grid() -> None:
    phase = ticks(1000) * (1 << 32) // 1000
    np.testing.assert_allclose(sine(phase) / UNIT, np.sin(2 * np.pi * np.arange(1000) / 1000), atol=2e-3)
    assert advance(120) * SAMPLE_RATE / 2**32 == pytest.approx(110, rel=1e-4)  # an octave above 55 Hz


def test_noise_is_centred_and_white() -> None:
    noise = Draws("any").noise(100_000) / 209
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.02


@pytest.mark.parametrize("half_decibels", [20, 60])
def test_levels_are_decibels_below_full_scale(half_decibels: int) -> None:
    levelled = to_level(Draws("any").noise(10_000), half_decibels) / 32768
    assert 20 * np.log10(levelled.std()) == pytest.approx(-half_decibels / 2, abs=0.1)


@pytest.mark.parametrize("name", BASE)
def test_every_sound_sounds_and_lies_below_half_the_sample_rate(name: str) -> None:
    for variant in range(7):
        sound = SOUNDS[name].varied(variant)
        made = sound.make(Draws(name, variant), 4000, advance(sound.low))
        assert np.abs(made).max() > UNIT / 50
        assert np.abs(made).max() < 1 << 24  # squares and sums stay within 64 bits


def test_looks_and_sounds_name_the_same_classes() -> None:
    assert list(SOUNDS) == list(LOOKS)


def test_a_scene_does_not_depend_on_the_size_of_its_split() -> None:
    few, many = AvEvents("test", SMALL), AvEvents("test", AvEventsConfig(**{**vars(SMALL), "test": 9, "train": 2}))
    for kept, same in zip(few.tensors(), many.tensors(), strict=True):
        assert torch.equal(kept, same[: len(few)])
    assert few.digest != many.digest


def test_splits_and_seeds_share_no_scene() -> None:
    other = AvEventsConfig(**{**vars(SMALL), "seed": 1})
    made = [scene(config, split, i) for config in (SMALL, other) for split in ("train", "test") for i in range(4)]
    assert len({one.audio.tobytes() for one in made}) == len({one.frames.tobytes() for one in made}) == len(made)


def test_another_frame_size_leaves_the_sound_and_another_length_the_plan() -> None:
    larger = AvEventsConfig(**{**vars(SMALL), "frame_size": 20})
    assert np.array_equal(scene(SMALL, "test", 0).audio, scene(larger, "test", 0).audio)
    longer = AvEventsConfig(**{**vars(SMALL), "seconds": 0.3})
    assert [e.label for e in scene(SMALL, "test", 0).events] == [e.label for e in scene(longer, "test", 0).events]


def test_a_sample_is_raw_and_in_range() -> None:
    samples: Samples = AvEvents("test", SMALL)
    assert samples.name == "av-events/test" and samples.label_kind == "multilabel"
    assert list(samples.ids) == [f"av-events/test/000{index}" for index in range(4)]
    for index in range(4):
        sample = samples.load(index)
        assert sample.id == samples.ids[index] and sample.signal == {}
        assert sample.labels is not None and sample.labels.shape == (len(samples.classes),)
        assert 1 <= sample.labels.sum() <= 3
        for modality, spec in AvEvents("test", SMALL).specs.items():
            spec.check(modality, sample.inputs[modality][None])


def test_load_and_tensors_agree() -> None:
    samples = AvEvents("validation", SMALL)
    audio, frames, labels = samples.tensors()
    assert (audio.dtype, frames.dtype, labels.dtype) == (torch.int16, torch.uint8, torch.uint8)
    sample = samples.load(3)
    assert torch.equal(sample.inputs["audio"] * 32768, audio[3].float())
    assert torch.equal((sample.inputs["visual"] * 255).round(), frames[3].float())
    assert torch.equal(sample.labels, labels[3].float())
    assert torch.equal(labels, (samples.audible + samples.visible).clamp(max=1))


def test_an_event_is_lost_to_either_modality_as_often_as_told_and_never_to_both() -> None:
    for reliability in (0.85, 0.5):
        config = AvEventsConfig(**{**vars(SMALL), "modality_reliability": reliability})
        events = [event for planned in plans(config) for event in planned]
        assert np.mean([event.audible for event in events]) == pytest.approx(reliability, abs=0.03)
        assert np.mean([event.visible for event in events]) == pytest.approx(reliability, abs=0.03)
        assert all(event.audible or event.visible for event in events)


def test_what_cannot_be_heard_or_seen_is_not_there() -> None:
    config = AvEventsConfig(**{**vars(SMALL), "modality_reliability": 1.0, "classes": 2})
    lossy = AvEventsConfig(**{**vars(config), "modality_reliability": 0.5})
    for index in range(30):
        full, lost = scene(config, "test", index), scene(lossy, "test", index)
        assert np.array_equal(full.audio, lost.audio) == all(event.audible for event in lost.events)
        assert np.array_equal(full.frames, lost.frames) == all(event.visible for event in lost.events)


def test_one_to_three_different_events_within_the_clip() -> None:
    for planned in plans(AvEventsConfig(seconds=1.5, frames=1, frame_size=16), count=200):
        assert 1 <= len(planned) <= 3
        assert len({event.label for event in planned}) == len(planned)
        assert all(0 <= event.start < event.end <= 24_000 for event in planned)


def test_imbalance_makes_the_first_class_commoner_than_the_last() -> None:
    def ratio(imbalance: float) -> float:
        config = AvEventsConfig(**{**vars(SMALL), "imbalance": imbalance, "cooccurrence": 0.0})
        labels = [planned[0].label for planned in plans(config)]
        return labels.count(0) / labels.count(9)

    assert ratio(1) == pytest.approx(1, abs=0.35)
    assert ratio(20) == pytest.approx(20, rel=0.6)


def test_cooccurrence_brings_partners_together() -> None:
    def share(cooccurrence: float) -> float:
        config = AvEventsConfig(**{**vars(SMALL), "imbalance": 1.0, "cooccurrence": cooccurrence})
        pairs = [(planned[0].label, planned[1].label) for planned in plans(config) if len(planned) > 1]
        return float(np.mean([second == (first + 5) % 10 for first, second in pairs]))

    assert share(0) == pytest.approx(1 / 9, abs=0.04)
    assert share(0.5) == pytest.approx(0.5 + 0.5 / 9, abs=0.05)
    assert share(1) == 1


@pytest.mark.parametrize("classes", [2, 3, 527])
def test_any_number_of_classes(classes: int) -> None:
    config = AvEventsConfig(**{**vars(SMALL), "classes": classes, "imbalance": 1.0})
    assert len(set(config.class_names)) == classes
    assert config.class_names[:2] == ("string", "bell")
    labels = {event.label for planned in plans(config, count=600) for event in planned}
    assert max(labels) < classes and len(labels) > min(classes, 300) - 1
    assert AvEvents("test", config).tensors()[2].shape == (4, classes)


def test_classes_past_the_base_are_named_and_made_by_variation() -> None:
    assert AvEventsConfig(classes=12).class_names[10:] == ("string-2", "bell-2")
    looks = {(look.shape, look.hue) for base in BASE for variant in range(53) for look in [LOOKS[base].varied(variant)]}
    assert len(looks) > 500


def test_the_cache_gives_back_the_same_bytes_without_generating(cache: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    first = AvEvents("train", SMALL, progress=lambda *step: steps.append(step))
    assert steps == [("generating av-events/train", done, 6) for done in range(1, 7)]
    again = AvEvents("train", SMALL, progress=lambda *step: pytest.fail("generated again"))
    assert again.digest == first.digest
    assert all(torch.equal(old, new) for old, new in zip(first.tensors(), again.tensors(), strict=True))
    assert len(list(cache.iterdir())) == 1


def test_the_cache_tells_knobs_apart_but_not_sizes_of_other_splits(cache: Path) -> None:
    AvEvents("test", SMALL)
    AvEvents("test", AvEventsConfig(**{**vars(SMALL), "train": 77, "modality_reliability": 0.85}))
    assert len(list(cache.iterdir())) == 1
    AvEvents("test", AvEventsConfig(**{**vars(SMALL), "imbalance": 3}))
    assert len(list(cache.iterdir())) == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


def replace(path: Path) -> None:
    save_file({"other": torch.zeros(3)}, path)


@pytest.mark.parametrize("harm", [cut, empty, flip, replace], ids=lambda harm: harm.__name__)
def test_a_corrupt_file_is_made_again(harm, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = AvEvents("test", SMALL).digest
    whole = file_of(cache).read_bytes()
    harm(file_of(cache))
    with caplog.at_level(logging.WARNING):
        assert AvEvents("test", SMALL).digest == digest
    assert "generating the scenes again" in caplog.text
    assert load_file(file_of(cache)).keys() == {"audio", "frames", "audible", "visible"}
    assert file_of(cache).read_bytes() == whole


def test_without_a_writable_cache_the_scenes_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = AvEvents("test", SMALL).digest
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("ROBUSTAV_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING):
        assert AvEvents("test", SMALL).digest == expected
    assert "they stay in memory" in caplog.text


def test_an_interrupted_write_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    AvEvents("test", SMALL)
    assert list(cache.iterdir()) == []


def digest_of_test_split(_: int) -> str:
    return AvEvents("test", SMALL).digest


def test_processes_that_generate_at_once_agree(cache: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        digests = set(pool.map(digest_of_test_split, range(4)))
    assert digests == {AvEvents("test", SMALL).digest}
    assert len(list(cache.iterdir())) == 1


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ROBUSTAV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "robustav"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "robustav"


def test_an_unknown_split_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"`split` must be one of \['train', 'validation', 'test'\], got 'dev'"):
        AvEvents("dev")


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("seed", -1, "`seed` must be a whole number from 0 to"),
        ("classes", 1, "`classes` must be a whole number from 2 to 527, got 1"),
        ("classes", 528, "got 528"),
        ("classes", 10.0, "`classes` must be a whole number"),
        ("classes", True, "got True"),
        ("imbalance", 0.5, "`imbalance` must be a number from 1 to 1,000, got 0.5"),
        ("cooccurrence", 1.1, "`cooccurrence` must be a number from 0 to 1, got 1.1"),
        ("modality_reliability", 0.4, "`modality_reliability` must be a number from 0.5 to 1, got 0.4"),
        ("modality_reliability", float("nan"), "got nan"),
        ("seconds", "2", "`seconds` must be a number from 0.25 to 60, got '2'"),
        ("frames", 0, "`frames` must be a whole number from 1 to 64, got 0"),
        ("frame_size", 8, "`frame_size` must be a whole number from 16 to 512, got 8"),
        ("validation", 0, "`validation` must be a whole number from 1 to 10,000,000, got 0"),
    ],
)
def test_a_knob_out_of_range_is_named(knob: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AvEventsConfig(**{knob: value})
