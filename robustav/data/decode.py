"""Reading clips: whatever FFmpeg can open, as a mono waveform and as frames sampled in time.

Times are seconds from where the container's first track starts, and everything is chosen by timestamp: containers lie
about frame counts. Whatever is wrong with a clip raises `SkippedError` with the reason in words.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from jaxtyping import Float
from torch import Tensor

from robustav.data.samples import SkippedError

SILENCE = 1e-4  # peak amplitude: -80 dBFS
UNSCALED = 8.0  # peak amplitude; codecs overshoot 1 a little, never this much
RESYNCHRONISE = 0.1  # s; smaller steps between timestamps are rounding, larger ones are holes in the sound
LONGEST_HOLE = 60.0  # s
SEEK_FROM = 2.0  # s; decoding less than this is cheaper than a seek
PREROLL = 0.5  # s of sound decoded before the wanted part, so that the codec has settled
TOLERATED_LOSS = 0.1  # share of the wanted time
USUAL_RATE = 25  # frames per second, where a file names none

# Bare streams without an index: the durations that FFmpeg gives are guesses from the bit rate, and seeks miss.
UNTIMED = frozenset({"aac", "ac3", "amr", "dts", "eac3", "h264", "hevc", "loas", "m4v", "mp3", "mpegvideo"})
# Streams that are timed, but whose tracks' durations are taken from their last few packets only.
UNENDED = UNTIMED | {"mpeg", "mpegts"}
PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})

# Sample format -> (value of silence, value of full scale); a trailing "p" only means one plane a channel.
SCALES = {"u8": (128, 2**7), "s16": (0, 2**15), "s32": (0, 2**31), "flt": (0, 1), "dbl": (0, 1)}


class NoTrackError(SkippedError):
    """The file has no track of the wanted kind."""


def read_audio(
    path: str | Path, *, sample_rate: int = 16_000, start: float | None = None, end: float | None = None
) -> Float[Tensor, " time"]:
    """The first audio track as amplitude in [-1, 1]: mean of the channels, resampled to `sample_rate` Hz.

    Holes in the track, and its late start, are silence, so that sound stays aligned with picture. A track that ends
    before `end` gives fewer samples. Overshoot of a lossy codec is clipped. Audio already at `sample_rate` comes out
    as stored. Silence is refused: below -80 dBFS neither an SNR nor a share of the signal has a meaning.
    """
    begin, stop = checked_window(start, end)
    with opened(path) as container:
        stream = track(container, "audio")
        mono, rate = gathered(decoded(container, stream, begin, stop), begin, stop)
    if not np.isfinite(mono).all():
        raise SkippedError("the audio has NaN or infinite samples")
    peak = float(np.abs(mono).max())
    if peak > UNSCALED:
        raise SkippedError(f"the audio peaks at {peak:g} times full scale: scale it to [-1, 1]")
    if peak < SILENCE:
        raise SkippedError("silent: the audio stays below -80 dBFS")
    return torch.from_numpy(resampled(mono, rate, sample_rate)).clamp(-1, 1)


def read_frames(
    path: str | Path, *, count: int, height: int, width: int, start: float | None = None, end: float | None = None
) -> Float[Tensor, "frame 3 height width"]:
    """`count` pictures of the first video track, spread evenly in time; RGB in [0, 1].

    Of each of `count` equal parts of the time from `start` to `end` (unless given, of the whole track), the picture
    on screen at its middle. Where the track has fewer pictures, or none yet, the nearest is repeated. Pictures are
    turned upright, scaled (bilinear, anti-aliased) until they cover `height` x `width`, and cropped at the centre.
    """
    begin, stop = checked_window(start, end)
    last = track_end(path)
    if begin >= last:
        raise SkippedError(f"the start at {begin:g} s is beyond the end of the picture at {last:.2f} s")
    stop = min(stop, last)
    moments = [begin + (i + 0.5) * (stop - begin) / count for i in range(count)]
    pictures: list[np.ndarray] = []
    with opened(path) as container:
        stream = track(container, "video")
        # Clips are decoded side by side, one core each: threads within a clip would only cost.
        stream.thread_count = 1
        convert = Converter(height, width, stream.sample_aspect_ratio)
        shown = None
        for time, frame in decoded(container, stream, begin, stop):
            shown = shown or frame
            while len(pictures) < count and moments[len(pictures)] < time - 1e-6:
                pictures.append(convert(shown))
            if len(pictures) == count:
                break
            shown = frame
        if shown is None:
            raise SkippedError("cannot be decoded: no picture in its video track")
        if len(pictures) < count:
            pictures += [convert(shown)] * (count - len(pictures))
    return as_tensor(pictures)


def read_frame_folder(
    path: str | Path, *, count: int, height: int, width: int
) -> Float[Tensor, "frame 3 height width"]:
    """`count` pictures spread evenly over a folder of frames (numbers in names sort as numbers); RGB in [0, 1].

    Frame `int((i + 0.5) * n / count)` of the folder's n, scaled and cropped as `read_frames` does.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise SkippedError(f"folder of frames missing: {folder}")
    files = sorted(frame_files(folder), key=natural)
    if not files:
        raise SkippedError(f"no {', '.join(sorted(PICTURES))} files in the folder of frames: {folder}")
    wanted = [files[int((i + 0.5) * len(files) / count)] for i in range(count)]
    pictures = {file: read_picture(file, height, width) for file in dict.fromkeys(wanted)}
    return as_tensor([pictures[file] for file in wanted])


def frame_files(folder: Path) -> list[Path]:
    """The pictures of a folder, in no order."""
    return [file for file in folder.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")]


def natural(path: Path) -> list[tuple[int, str]]:
    """A sort key under which frame2.png comes before frame10.png."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def read_picture(file: Path, height: int, width: int) -> np.ndarray:
    """One picture file, [height, width, 3] of bytes."""
    try:
        # By its bytes, not its name: FFmpeg reads "%03d" in the name of a picture as a pattern.
        with av.open(io.BytesIO(file.read_bytes()), "r", metadata_errors="replace") as container:
            for frame in container.decode(video=0):
                return Converter(height, width)(frame)
    except (av.FFmpegError, OSError, IndexError) as error:
        raise SkippedError(f"frame {file.name} cannot be decoded: {reason_of(error)}") from error
    raise SkippedError(f"frame {file.name} cannot be decoded: no picture in it")


def as_tensor(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().float().div_(255)


class Converter:
    """Scales decoded frames until they cover `height` x `width`, crops the centre, and turns them upright."""

    def __init__(self, height: int, width: int, aspect: Any = None) -> None:
        self.height, self.width = height, width
        # Real pixels are at most 2:1 or so; anything wilder is a broken header.
        self.aspect = float(aspect) if aspect and 1 / 4 <= aspect <= 4 else 1.0
        self.reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        quarters = round(frame.rotation / 90) % 4
        height, width = (self.width, self.height) if quarters % 2 else (self.height, self.width)
        scale = max(height / frame.height, width / (frame.width * self.aspect))
        covering = {
            "height": max(height, round(frame.height * scale)),
            "width": max(width, round(frame.width * self.aspect * scale)),
        }
        rgb = self.reformatter.reformat(
            frame, **covering, format="rgb24", interpolation="BILINEAR", src_color_range=frame.color_range
        ).to_ndarray()
        top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
        return np.rot90(rgb[top : top + height, left : left + width], quarters)


def checked_window(start: float | None, end: float | None) -> tuple[float, float]:
    begin, stop = 0.0 if start is None else float(start), float("inf") if end is None else float(end)
    if not 0 <= begin < stop:
        raise ValueError(f"`start` and `end` must be seconds with 0 <= start < end, got start={start}, end={end}")
    return begin, stop


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """The container at `path`; FFmpeg's errors, here and while it is read, become reasons."""
    try:
        if not Path(path).exists():
            raise SkippedError(f"file missing: {path}")
        if Path(path).is_dir():
            raise SkippedError(f"a folder, not a media file: {path}")
        if Path(path).stat().st_size == 0:
            raise SkippedError("the file is empty (0 bytes)")
        # "file:" keeps FFmpeg from reading a colon in a name as a protocol.
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            yield container
    except (av.FFmpegError, OSError) as error:
        raise SkippedError(f"cannot be decoded: {reason_of(error)}") from error


def track(container: Any, kind: str) -> Any:
    """The first track of a kind; the cover picture of a song is no video."""
    streams = [s for s in container.streams if s.type == kind and not s.disposition & Disposition.attached_pic]
    if not streams:
        raise NoTrackError(f"no {kind} track")
    if streams[0].codec_context is None:
        raise SkippedError(f"cannot be decoded: FFmpeg has no decoder for its {kind} track")
    return streams[0]


def origin_of(container: Any) -> float:
    # A negative start is a codec's lead-in, which players drop.
    return max(0, container.start_time or 0) / av.time_base


def promised_end(container: Any) -> float | None:
    """Where the container says that it ends, in seconds; None where nothing trustworthy says so."""
    trusted = container.duration and container.format.name not in UNTIMED
    return container.duration / av.time_base if trusted else None


def track_end(path: str | Path) -> float:
    """Where the video track ends, in seconds; found by reading its packets where the file does not say."""
    with opened(path) as container:
        stream = track(container, "video")
        if stream.duration and container.format.name not in UNENDED:
            return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - origin_of(container)
        if (promised := promised_end(container)) is not None and container.format.name not in UNENDED:
            return promised
        rate = stream.average_rate or USUAL_RATE
        end = total = 0.0
        for packet in container.demux(stream):
            if packet.size:
                total += float(packet.duration * packet.time_base if packet.duration else 1 / rate)
                end = max(end, packet_end(packet) - origin_of(container))
        if not total:
            raise SkippedError("zero length: its video track holds no pictures")
        return end if end > 0 else total


def packet_end(packet: Any) -> float:
    stamp = packet.pts if packet.pts is not None else packet.dts
    return 0.0 if stamp is None else float((stamp + (packet.duration or 0)) * packet.time_base)


def decoded(container: Any, stream: Any, start: float, stop: float) -> Iterator[tuple[float, Any]]:
    """Frames with their times, from at or before `start` until the reader has enough or the file ends."""
    if start > SEEK_FROM and container.format.name not in UNTIMED:
        first = None
        with suppress(av.FFmpegError, SkippedError):
            container.seek(int((start - PREROLL + origin_of(container)) / stream.time_base), stream=stream)
            frames = timed(container, stream, start, stop)
            first = next(frames, None)
        if first is not None and first[0] <= start:
            yield first
            yield from frames
            return
        # Without an index a seek may miss, or land between key frames: then only decoding from the beginning helps.
        container.seek(container.start_time or 0)
    yield from timed(container, stream, start, stop)


def timed(container: Any, stream: Any, start: float, stop: float) -> Iterator[tuple[float, Any]]:
    """Frames with their times from where the container stands. A damaged packet is passed over.

    If the file ends having lost more than a tenth of what it promised between `start` and `stop`, raises
    `SkippedError`.
    """
    origin, promised = origin_of(container), promised_end(container)
    reached = lost = time = 0.0
    for packet in packets(container):
        if packet.stream.type in ("audio", "video"):
            reached = max(reached, packet_end(packet) - origin)
        if packet.stream.index != stream.index:
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError:
            if packet_end(packet) - origin > start:
                lost += float((packet.duration or 0) * packet.time_base)
            continue
        for frame in frames:
            time = frame.time - origin if frame.time is not None else time
            yield time, frame
            time += duration_of(frame, stream)
    if promised is not None and (wanted := min(stop, promised) - start) > 0:
        missing = min(stop, promised) - reached + lost
        if missing > TOLERATED_LOSS * wanted:
            raise SkippedError(f"truncated or damaged: {missing:.1f} s of {wanted:.1f} s cannot be decoded")


def packets(container: Any) -> Iterator[Any]:
    # An error between packets is treated as the end of the file: what was lost is reckoned there.
    with suppress(av.FFmpegError):
        yield from container.demux()


def duration_of(frame: Any, stream: Any) -> float:
    if isinstance(frame, av.AudioFrame):
        return frame.samples / frame.sample_rate
    if frame.duration:
        return float(frame.duration * frame.time_base)
    return float(1 / (stream.average_rate or USUAL_RATE))


def gathered(frames: Iterator[tuple[float, Any]], start: float, stop: float) -> tuple[np.ndarray, int]:
    """The mean of the channels between two times, and its rate."""
    pieces: list[tuple[int, np.ndarray]] = []
    cursor, rate, wanted = 0, 0, float("inf")
    for time, frame in frames:
        if not rate:
            rate, wanted = frame.sample_rate, (stop - start) * frame.sample_rate
        if frame.sample_rate != rate:
            raise SkippedError(f"the audio changes its sample rate midway, from {rate} Hz to {frame.sample_rate} Hz")
        stamped = round((time - start) * rate)
        # Later timestamps are often rounded, to milliseconds for instance: sound goes on where it was.
        at = stamped if not pieces or stamped - cursor > RESYNCHRONISE * rate else cursor
        if at >= wanted:
            break
        if (hole := (at - max(cursor, 0)) / rate) > LONGEST_HOLE:
            raise SkippedError(f"broken timestamps: {hole:.0f} s without audio")
        pieces.append((at, mono_of(frame)))
        cursor = at + frame.samples
    if not rate:
        raise SkippedError("zero length: its audio track holds no samples")
    length = min(cursor, round(wanted) if wanted < float("inf") else cursor)
    if length <= 0:
        raise SkippedError(f"the start at {start:g} s is beyond the end of the audio at {start + cursor / rate:.2f} s")
    mono = np.zeros(length, dtype=np.float32)
    for at, piece in pieces:
        piece = piece[max(0, -at) : max(0, length - at)]
        mono[max(0, at) : max(0, at) + len(piece)] = piece
    return mono, rate


def mono_of(frame: av.AudioFrame) -> np.ndarray:
    form = frame.format.name.removesuffix("p")
    if form not in SCALES:
        raise SkippedError(f"cannot be decoded: audio samples of the form {frame.format.name}")
    zero, full = SCALES[form]
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, len(frame.layout.channels)).T
    if len(samples) == 1 and samples.dtype == np.float32:
        return samples[0]
    return ((samples.mean(axis=0, dtype=np.float64) - zero) / full).astype(np.float32)


def resampled(mono: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    """Windowed-sinc resampling by FFmpeg; sample 0 stays at time 0."""
    if rate == sample_rate:
        return mono
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=sample_rate)
    frame = av.AudioFrame.from_ndarray(mono[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    out = [piece.to_ndarray()[0] for given in (frame, None) for piece in resampler.resample(given)]
    length = max(1, round(len(mono) * sample_rate / rate))
    joined = np.concatenate([*out, np.zeros(length, dtype=np.float32)])  # a filter that ends early ends in silence
    return joined[:length].copy()
