"""Decoding: real clips, and made-up media whose content is known."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from robustav.data.decode import NoTrackError, read_audio, read_frame_folder, read_frames
from robustav.data.samples import SkippedError

SMALL, LARGE, SOUND = "00W1lcxW-WU_40.000.mp4", "KlsG1EnBEjc_000361.mp4", "BfvyPmVMo_20.000.wav"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}


def sine(hertz: float, seconds: float, rate: int, amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def solid(*names: str, repeat: int = 1, height: int = 48, width: int = 64) -> list[np.ndarray]:
    colours = [COLOURS[name] for name in names for _ in range(repeat)]
    return [np.broadcast_to(np.array(c, dtype=np.uint8), (height, width, 3)).copy() for c in colours]


def write(
    path: Path,
    *,
    sound: np.ndarray | None = None,
    rate: int = 16_000,
    pictures: list[np.ndarray] | None = None,
    per_second: int = 10,
    codecs: tuple[str, str] = ("aac", "mpeg4"),
    sound_from: float = 0.0,
    prepare: Callable[[Any], None] = lambda stream: None,
    options: dict[str, str] | None = None,
    group: int = 12,
) -> Path:
    """A media file of `sound` [channel, time] or [time] and `pictures` [height, width, 3]."""
    with av.open(str(path), "w", options=options or {}) as container:
        video = audio = None
        if pictures is not None:
            video = container.add_stream(codecs[1], rate=per_second)
            video.height, video.width, video.pix_fmt = *pictures[0].shape[:2], video.codec.video_formats[0].name
            video.bit_rate, video.gop_size = 2_000_000, group
            prepare(video)
        if sound is not None:
            sound = np.atleast_2d(sound)
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(sound)]
            audio = container.add_stream(codecs[0], rate=rate, layout=layout)
        for index, picture in enumerate(pictures or []):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, per_second)
            container.mux(video.encode(frame))
        if video is not None:
            container.mux(video.encode(None))
        if sound is not None:
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, round(sound_from * rate), Fraction(1, rate)
            chunks = av.AudioResampler(audio.format, layout, rate, audio.codec_context.frame_size or 1024)
            for piece in [*chunks.resample(frame), *chunks.resample(None)]:
                container.mux(audio.encode(piece))
            container.mux(audio.encode(None))
    return path


def wav(path: Path, sound: np.ndarray, rate: int = 16_000, codec: str = "pcm_f32le") -> Path:
    return write(path, sound=sound, rate=rate, codecs=(codec, ""))


def colour_of(picture: torch.Tensor) -> str:
    """The name of a picture's colour, if it is that all over."""
    inside = picture[:, 2:-2, 2:-2].flatten(1)
    assert (inside.amax(1) - inside.amin(1)).max() < 0.05
    mean = 255 * inside.mean(1)
    return min(COLOURS, key=lambda name: float((mean - torch.tensor(COLOURS[name])).abs().max()))


def pictures_of(path: Path) -> Iterator[tuple[float, av.VideoFrame]]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.time, frame


@pytest.mark.parametrize(("name", "seconds"), [(SMALL, 10.0), (LARGE, 10.037)])
def test_frames_are_those_on_screen_at_the_middle_of_each_part(clips_folder: Path, name: str, seconds: float):
    frames = read_frames(clips_folder / name, count=10, height=72, width=72)
    assert frames.shape == (10, 3, 72, 72) and frames.dtype == torch.float32
    assert frames.min() >= 0 and frames.max() <= 1 and frames.std() > 0.1
    decoded = list(pictures_of(clips_folder / name))
    for index, picture in enumerate(frames):
        moment = (index + 0.5) * seconds / 10
        shown = [frame for time, frame in decoded if time <= moment][-1]
        width = round(shown.width * 72 / shown.height)
        whole = shown.reformat(width=width, height=72, format="rgb24", interpolation="BILINEAR").to_ndarray()
        left = (width - 72) // 2
        expected = torch.from_numpy(whole[:, left : left + 72]).permute(2, 0, 1) / 255
        torch.testing.assert_close(picture, expected, rtol=0, atol=2 / 255)


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_a_late_start_gives_the_pictures_and_sound_of_that_time(clips_folder: Path, name: str):
    path = clips_folder / name
    late = read_frames(path, count=3, height=48, width=64, start=6, end=9)
    whole = read_frames(path, count=9, height=48, width=64, start=0, end=9)
    torch.testing.assert_close(late, whole[6:])
    sound, all_sound = read_audio(path, start=6, end=9), read_audio(path)
    assert sound.shape == (3 * 16_000,)
    # Not equal: the smaller clip's timestamps are a sample of 44.1 kHz off what its packets hold.
    same = torch.corrcoef(torch.stack([sound, all_sound[6 * 16_000 : 9 * 16_000]]))[0, 1]
    later = torch.corrcoef(torch.stack([sound, all_sound[6 * 16_000 + 4 : 9 * 16_000 + 4]]))[0, 1]
    assert same > 0.98 and same > later + 0.05


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_real_sound_is_resampled(clips_folder: Path, name: str):
    sound = read_audio(clips_folder / name)
    assert sound.dtype == torch.float32 and sound.abs().max() <= 1
    assert len(sound) / 16_000 == pytest.approx(10, abs=0.05)
    assert len(read_audio(clips_folder / name, sample_rate=8_000)) == pytest.approx(len(sound) / 2, abs=1)


def test_sound_already_at_the_rate_comes_out_as_stored(clips_folder: Path):
    content = (clips_folder / SOUND).read_bytes()
    stored = np.frombuffer(content[-640_000:], dtype="<f4")
    assert read_audio(clips_folder / SOUND).numpy().tobytes() == stored.tobytes()
    part = read_audio(clips_folder / SOUND, start=2.5, end=4)
    assert part.numpy().tobytes() == stored[40_000:64_000].tobytes()


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_every_sample_format_has_the_same_amplitude(tmp_path: Path, codec: str):
    tone = sine(440, 0.5, 16_000)
    sound = read_audio(wav(tmp_path / "tone.wav", tone, codec=codec))
    torch.testing.assert_close(sound, torch.from_numpy(tone), rtol=0, atol=1 / 64 if codec == "pcm_u8" else 1e-4)


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (22_050, 1), (44_100, 2), (48_000, 6)])
def test_a_tone_keeps_frequency_amplitude_phase_and_length(tmp_path: Path, rate: int, channels: int):
    tone = sine(1000, 2, rate)
    sound = read_audio(wav(tmp_path / "tone.wav", np.tile(tone, (channels, 1)), rate))
    assert len(sound) == 2 * 16_000
    assert np.abs(np.fft.rfft(sound)).argmax() / 2 == 1000
    expected = torch.from_numpy(sine(1000, 2, 16_000))
    torch.testing.assert_close(sound[200:-200], expected[200:-200], rtol=0, atol=2e-3)


def test_channels_are_averaged(tmp_path: Path):
    left, right = sine(500, 1, 16_000, 0.8), sine(2000, 1, 16_000, 0.4)
    sound = read_audio(wav(tmp_path / "two.wav", np.stack([left, right])))
    torch.testing.assert_close(sound, torch.from_numpy((left + right) / 2))


def test_sound_that_starts_late_is_padded_in_front(tmp_path: Path):
    path = write(
        tmp_path / "late.mkv", sound=sine(500, 1, 16_000), sound_from=1.5, pictures=solid("red", repeat=30),
        codecs=("pcm_s16le", "mpeg4"),
    )  # fmt: skip
    sound = read_audio(path)
    assert len(sound) == pytest.approx(2.5 * 16_000, abs=32)
    assert sound[: int(1.49 * 16_000)].abs().max() == 0 and sound[int(1.51 * 16_000) :].abs().max() > 0.4
    assert read_audio(path, start=1, end=2)[: int(0.49 * 16_000)].abs().max() == 0


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.ts", "clip.mpg", "clip.mov", "bare.m4v"])
def test_solid_colours_come_at_their_time(tmp_path: Path, name: str):
    pictures = solid("red", "green", "blue", "grey", "red", "green", repeat=10)
    sound = None if name == "bare.m4v" else sine(300, 2.4, 16_000)
    codecs = ("mp2", "mpeg2video") if name.endswith((".ts", ".mpg")) else ("pcm_s16le", "mpeg4")
    codecs = ("aac", "mpeg4") if name.endswith(".mp4") else codecs
    path = write(tmp_path / name, pictures=pictures, per_second=25, sound=sound, codecs=codecs)
    frames = read_frames(path, count=6, height=32, width=32)
    assert [colour_of(frame) for frame in frames] == ["red", "green", "blue", "grey", "red", "green"]
    frames = read_frames(path, count=2, height=32, width=32, start=0.4, end=1.2)
    assert [colour_of(frame) for frame in frames] == ["green", "blue"]


def test_a_seek_lands_on_the_right_second(tmp_path: Path):
    pictures = solid("red", "green", "blue", "grey", "red", "green", "blue", "grey", repeat=25, height=32, width=32)
    for name in ("clip.mp4", "clip.mkv", "clip.avi", "clip.ts"):
        codec = "mpeg2video" if name.endswith("ts") else "mpeg4"
        path = write(tmp_path / name, pictures=pictures, per_second=25, codecs=("", codec), group=10)
        frames = read_frames(path, count=3, height=32, width=32, start=5, end=8)
        assert [colour_of(frame) for frame in frames] == ["green", "blue", "grey"], name


@pytest.mark.parametrize("flags", ["frag_keyframe+empty_moov", "faststart"])
def test_fragmented_and_reordered_mp4(tmp_path: Path, flags: str):
    path = write(
        tmp_path / "clip.mp4", pictures=solid("red", "blue", repeat=10), sound=sine(300, 2, 16_000),
        options={"movflags": flags},
    )  # fmt: skip
    frames = read_frames(path, count=2, height=32, width=32)
    assert [colour_of(frame) for frame in frames] == ["red", "blue"]
    assert len(read_audio(path)) == pytest.approx(2 * 16_000, abs=2048)


def test_few_pictures_are_repeated(tmp_path: Path):
    frames = read_frames(write(tmp_path / "one.mp4", pictures=solid("blue")), count=4, height=16, width=16)
    assert frames.shape == (4, 3, 16, 16) and {colour_of(frame) for frame in frames} == {"blue"}


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 80), (80, 40)])
def test_the_centre_is_what_is_left_after_the_crop(tmp_path: Path, height: int, width: int):
    picture = solid("grey", height=120, width=240)[0]
    picture[50:70, 110:130] = COLOURS["red"]
    path = write(tmp_path / "clip.mkv", pictures=[picture] * 5, codecs=("", "ffv1"))
    (frame,) = read_frames(path, count=1, height=height, width=width)
    red = frame[0] - frame[1] > 0.3
    rows, columns = red.nonzero().float().mean(0).tolist()
    assert (rows, columns) == (pytest.approx(height / 2 - 0.5, abs=0.6), pytest.approx(width / 2 - 0.5, abs=0.6))


def test_pictures_are_turned_upright(tmp_path: Path):
    picture = solid("grey", height=64, width=128)[0]
    picture[:, :32] = COLOURS["red"]  # on the left as stored
    path = write(tmp_path / "phone.mp4", pictures=[picture] * 5)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    # A quarter turn clockwise, as a phone held upright writes it: a, b, u, c, d, v.
    turned = [0, 1 << 16, 0, -(1 << 16), 0, 0]
    content[matrix : matrix + 24] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    path.write_bytes(content)
    (frame,) = read_frames(path, count=1, height=128, width=64)
    red = frame[0] - frame[1] > 0.3
    assert red[:28].all() and not red[36:].any()


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path):
    def wide(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    picture = solid("grey", height=64, width=64)[0]
    picture[:, :16] = picture[:, -16:] = COLOURS["red"]  # just what the crop to a square takes away
    path = write(tmp_path / "wide.mkv", pictures=[picture] * 5, prepare=wide)
    (frame,) = read_frames(path, count=1, height=64, width=64)
    assert colour_of(frame) == "grey"


def test_a_folder_of_frames_is_sorted_by_number(tmp_path: Path):
    for index, name in enumerate(["red", "green", "blue", "grey"] * 3, start=1):
        suffix = (".png", "png", "rgb24") if index % 2 else (".jpg", "mjpeg", "yuvj420p")
        write_picture(tmp_path / f"50%d frame{index}{suffix[0]}", solid(name)[0], *suffix[1:])
    (tmp_path / "notes.txt").write_text("not a picture")
    frames = read_frame_folder(tmp_path, count=12, height=32, width=32)
    assert [colour_of(frame) for frame in frames] == ["red", "green", "blue", "grey"] * 3
    assert [colour_of(frame) for frame in read_frame_folder(tmp_path, count=2, height=8, width=8)] == ["grey", "green"]


def write_picture(path: Path, picture: np.ndarray, codec: str, form: str) -> None:
    encoder = av.CodecContext.create(codec, "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *picture.shape[:2], form, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=form)
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))


def both(path: Path) -> list[Callable[[], torch.Tensor]]:
    return [lambda: read_audio(path), lambda: read_frames(path, count=4, height=16, width=16)]


def test_files_that_are_no_media(tmp_path: Path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("These are not the frames you are looking for.\n" * 50)
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(5_000))
    reasons = {
        "gone.mp4": "file missing: .*gone.mp4",
        "empty.mp4": "the file is empty",
        "text.mp4": "cannot be decoded: Invalid data",
        "noise.mp3": "cannot be decoded|no video track|zero length",
        ".": "a folder, not a media file",
    }
    for name, reason in reasons.items():
        for read in both(tmp_path / name):
            with pytest.raises(SkippedError, match=reason):
                read()


def test_missing_tracks(tmp_path: Path):
    with pytest.raises(NoTrackError, match=r"no audio track"):
        read_audio(write(tmp_path / "mute.mp4", pictures=solid("red", repeat=5)))
    with pytest.raises(NoTrackError, match=r"no video track"):
        read_frames(wav(tmp_path / "blind.wav", sine(300, 1, 16_000)), count=1, height=8, width=8)


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (np.zeros(16_000), "silent: .*-80 dBFS"),
        (np.full(16_000, 0.9e-4), "silent: .*-80 dBFS"),
        (np.full(16_000, 12_345.0), "peaks at 12345 times full scale"),
        (np.where(np.arange(16_000) == 77, np.nan, 0.1), "NaN or infinite"),
        (np.where(np.arange(16_000) == 77, np.inf, 0.1), "NaN or infinite"),
    ],
)
def test_unusable_sound(tmp_path: Path, samples: np.ndarray, reason: str):
    with pytest.raises(SkippedError, match=reason):
        read_audio(wav(tmp_path / "bad.wav", samples.astype(np.float32)))


def test_sound_without_samples(tmp_path: Path):
    path = wav(tmp_path / "nothing.wav", sine(300, 1, 16_000))
    content = path.read_bytes()
    data = content.index(b"data")
    path.write_bytes(content[: data + 4] + bytes(4))
    with pytest.raises(SkippedError, match=r"zero length|cannot be decoded"):
        read_audio(path)


def test_overshoot_is_clipped(tmp_path: Path):
    assert read_audio(wav(tmp_path / "loud.wav", sine(300, 1, 16_000, amplitude=1.3))).abs().max() == 1


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_cut_file_is_refused(tmp_path: Path, name: str):
    whole = write(
        tmp_path / name, sound=sine(300, 8, 16_000), pictures=solid("red", "blue", repeat=40),
        options={"movflags": "faststart"} if name.endswith("mp4") else {},
    )  # fmt: skip
    content = whole.read_bytes()
    for share in (0.3, 0.6):
        cut = tmp_path / f"cut{share}{whole.suffix}"
        cut.write_bytes(content[: int(len(content) * share)])
        for read in both(cut):
            with pytest.raises(SkippedError, match=r"truncated or damaged|cannot be decoded"):
                read()


def test_a_cut_real_clip_is_refused(clips_folder: Path, tmp_path: Path):
    for name in (SMALL, LARGE, SOUND):
        content = (clips_folder / name).read_bytes()
        cut = tmp_path / f"cut{Path(name).suffix}"
        cut.write_bytes(content[: len(content) // 2])
        with pytest.raises(
            SkippedError, match=r"truncated or damaged: 5.. s of 10.0 s|cannot be decoded: Invalid data"
        ):
            read_audio(cut)


def test_a_start_beyond_the_end(tmp_path: Path):
    path = write(tmp_path / "short.mp4", sound=sine(300, 2, 16_000), pictures=solid("red", repeat=20))
    with pytest.raises(SkippedError, match=r"start at 7 s is beyond the end of the audio at 2"):
        read_audio(path, start=7)
    with pytest.raises(SkippedError, match=r"start at 7 s is beyond the end of the picture at 2.00 s"):
        read_frames(path, count=2, height=8, width=8, start=7, end=9)


def test_a_track_shorter_than_the_end_gives_what_it_has(tmp_path: Path):
    sound = read_audio(wav(tmp_path / "short.wav", sine(300, 2, 16_000)), start=0.5, end=10)
    assert len(sound) == 1.5 * 16_000


@pytest.mark.parametrize(("start", "end"), [(-1, None), (2, 2), (3, 1), (math.nan, None)])
def test_impossible_times(tmp_path: Path, start: float, end: float | None):
    with pytest.raises(ValueError, match=r"0 <= start < end, got start="):
        read_audio(tmp_path / "any.wav", start=start, end=end)


def test_damaged_frame_folders(tmp_path: Path):
    with pytest.raises(SkippedError, match=r"folder of frames missing"):
        read_frame_folder(tmp_path / "gone", count=1, height=8, width=8)
    with pytest.raises(SkippedError, match=r"no .*\.png.* files in the folder of frames"):
        read_frame_folder(tmp_path, count=1, height=8, width=8)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(SkippedError, match=r"frame 1.png cannot be decoded"):
        read_frame_folder(tmp_path, count=1, height=8, width=8)


def test_odd_names_and_silence_of_ffmpeg(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    for name in ("http:odd.wav", "-dash.wav", "per%03d cent.wav", "ünï 'quote\".wav"):
        assert len(read_audio(wav(tmp_path / "plain.wav", sine(300, 1, 16_000)).rename(tmp_path / name))) == 16_000
    (tmp_path / "text.mp4").write_text("no media" * 99)
    with pytest.raises(SkippedError):
        read_audio(tmp_path / "text.mp4")
    assert capfd.readouterr() == ("", "")
