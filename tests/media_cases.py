"""Files of media made in memory, and what goes wrong with them: shared by the media suites."""

from __future__ import annotations

import io
import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image


def picture(color: Any = "red", size: tuple[int, int] = (8, 8), *, format: str = "PNG", mode: str = "RGB") -> bytes:
    """A picture of one colour."""
    return saved(Image.new(mode, size, color), format)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The file of an image."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A picture that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels))


def bomb(width: int, height: int) -> bytes:
    """A well-made PNG of a few bytes per million pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + width * 3)
    body = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def sound(seconds: float = 0.5, *, rate: int = 16000, channels: int = 1, level: float = 0.5) -> bytes:
    """A WAV file; every channel has the same tone."""
    tone = level * np.sin(np.arange(round(seconds * rate)) * 0.05)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.repeat(tone[:, None], channels, axis=1) * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def video(
    path: Path, *, frames: int = 12, rate: int = 10, size: tuple[int, int] = (48, 32), first: int = 0, green: int = 0,
    format: str = "mp4", codec: str = "mpeg4", **options: str,
) -> bytes:  # fmt: skip
    """A film whose left half is red and whose right half gets brighter with each frame."""
    with av.open(str(path), "w", format=format, options=options) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            image = Image.new("RGB", size, "red")
            image.paste((0, green, 20 * number % 256), (size[0] // 2, 0, *size))
            frame: Any = av.VideoFrame.from_image(image)
            frame.pts = first + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def turned(film: bytes) -> bytes:
    """An MP4 that players turn to the right, as phones write when they are held upright."""
    upright = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    right = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    start = film.index(upright, film.index(b"tkhd"))
    return film[:start] + right + film[start + len(upright) :]
