"""From the bytes of a file to pixels and samples, with bounds that hold before memory is spent.

Images through Pillow, audio and video through FFmpeg (PyAV): nothing here knows a model.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rayswift.config.job import MediaSpec
from rayswift.data.formats import RowError

if TYPE_CHECKING:
    from PIL.Image import Image

_CONTAINERS = "mov,matroska,webm,avi,wav,mp3,flac,ogg,aac,mpeg,mpegts,asf,flv,aiff,au,w64,caf,amr"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA")
"""What Pillow may open: formats whose header tells the size, and that no other program is started for (EPS is one)."""


class Clip(list["Image"]):
    """Frames of a video, evenly spread over its `duration` in seconds, and the second each is from."""

    def __init__(self, frames: Sequence[Image], times: Sequence[float], duration: float) -> None:
        super().__init__(frames)
        self.times, self.duration = list(times), duration

    @property
    def fps(self) -> float:
        """Kept frames per second."""
        return len(self) / self.duration if self.duration > 0 else 1.0


def decode_image(content: bytes, spec: MediaSpec) -> Image:
    """The image in RGB, upright. Raises RowError for what is no image, damaged, or over `spec.max_pixels`."""
    from PIL import Image, ImageOps

    with _named("image"), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower bound is checked below
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        if image.width * image.height > spec.max_pixels:
            raise RowError(
                f"has an image of {image.width}x{image.height} pixels, over data.media.max_pixels={spec.max_pixels}"
            )
        upright = ImageOps.exif_transpose(image)
        return _over_white(_eight_bit(upright)).convert("RGB")


def _eight_bit(image: Image) -> Image:
    """Greys of 16 bits become 8: Pillow would cut them off at 255, and make everything white."""
    from PIL import Image

    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    greys = np.asarray(image)
    if image.mode == "I" and greys.max() <= 255:
        return image
    return Image.fromarray((greys.clip(0, 65535) // 256).astype(np.uint8))


def _over_white(image: Image) -> Image:
    """What is transparent becomes white: black letters on nothing would vanish."""
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def decode_audio(content: bytes, rate: int, spec: MediaSpec) -> np.ndarray:
    """Mono samples at `rate` Hz, the mean of the channels, float32 in [-1, 1], of a sound or a video's sound track.

    Raises RowError for what has no sound, is damaged, or lasts longer than `spec.max_audio_seconds`.
    """
    import av

    parts: list[np.ndarray] = []
    length = 0
    with _named("audio"), _opened(content) as container:
        if not container.streams.audio:
            raise RowError("has an audio file without sound")
        resampler = av.AudioResampler(format="fltp", rate=rate)  # FFmpeg's own mono is louder than its channels
        for frame in _flushed(container.decode(audio=0)):
            more = frame.samples * rate / frame.sample_rate if frame is not None else 0  # of a slow one: gigabytes
            if length + more > spec.max_audio_seconds * rate + rate:
                raise _too_long(spec)
            for resampled in resampler.resample(frame):
                parts.append(resampled.to_ndarray().mean(axis=0))
                length += len(parts[-1])
            if length > spec.max_audio_seconds * rate:
                raise _too_long(spec)
    if not length:
        raise RowError("has an audio file without sound")
    return np.concatenate(parts).astype(np.float32, copy=False)


def _too_long(spec: MediaSpec) -> RowError:
    return RowError(f"has audio of more than data.media.max_audio_seconds={spec.max_audio_seconds:g}")


def _flushed(frames: Iterator[Any]) -> Iterator[Any]:
    yield from frames
    yield None


def decode_video(content: bytes, spec: MediaSpec) -> Clip:
    """About `spec.video_fps` frames per second, at most `spec.max_frames`, evenly spread.

    Raises RowError for what is no video, damaged, or of frames over `spec.max_pixels`.
    """
    import av

    with _named("video"), _opened(content) as container:
        cover = av.stream.Disposition.attached_pic
        stream = next((one for one in container.streams.video if not one.disposition & cover), None)
        if stream is None:
            raise RowError("has a video file without pictures")
        _check_pixels(stream, spec)
        duration = _duration(container, stream)
        count = max(2, min(spec.max_frames, round(duration * spec.video_fps)))
        step = duration / count
        frames: list[Image] = []
        times: list[float] = []
        first: float | None = None
        decoded = 0
        limit = round(duration * float(stream.average_rate or 30)) * 2 + 1000  # a header that lies ends somewhere
        for number, frame in enumerate(islice(container.decode(stream), limit)):
            time = float(frame.time if frame.time is not None else number / float(stream.average_rate or 1))
            first, decoded = time if first is None else first, number + 1
            if time - first + 1e-6 >= len(frames) * step:
                _check_pixels(frame, spec)  # a stream may change its size
                frames.append(_upright(frame))
                times.append(time - first)
            if len(frames) == count:
                break
    if not frames:
        raise RowError("has a video without a frame")
    if len(frames) < count and decoded < 0.9 * stream.frames:
        raise RowError(f"has a video that ends after {decoded} of its {stream.frames} frames")
    return Clip(frames, times, max(duration, times[-1]))


def _check_pixels(pictures: Any, spec: MediaSpec) -> None:
    if pictures.width * pictures.height > spec.max_pixels:
        raise RowError(
            f"has a video of {pictures.width}x{pictures.height} pixels, over data.media.max_pixels={spec.max_pixels}"
        )


def _upright(frame: Any) -> Image:
    """The picture as players show it: phones film sideways, and say so."""
    image: Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _duration(container: Any, stream: Any) -> float:
    """Seconds, from the stream, the container, or the number of frames; one second where none of them says."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration:
        return float(container.duration) / 1e6
    return float(stream.frames / stream.average_rate) if stream.frames and stream.average_rate else 1.0


def _opened(content: bytes) -> Any:
    """The file in FFmpeg, as one of the formats that people keep films and sounds in.

    Of its own accord FFmpeg also reads playlists, which name other files and URLs to be opened.
    """
    import av

    return av.open(io.BytesIO(content), "r", metadata_errors="ignore", options={"format_whitelist": _CONTAINERS})


@contextmanager
def _named(kind: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a RowError: files are other people's, and so are their faults."""
    try:
        yield
    except RowError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) and not hasattr(error, "errno"):  # FFmpeg's: sizes that a broken file claims
            raise
        raise RowError(
            f"has {'a' if kind == 'video' else 'an'} {kind} that cannot be decoded: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    """The error's text on one line, without the addresses of objects: an endpoint's clients read it too."""
    text = re.sub(r" *<\S+ object at 0x[0-9a-f]+>", "", " ".join(str(error).split()))
    return text[:200] or type(error).__name__
