"""From files to pixels and samples: every format, what is damaged, and bounds that hold before memory is spent."""

from __future__ import annotations

import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from rayswift.config.job import MediaSpec
from rayswift.data.formats import RowError
from rayswift.data.media.decoding import decode_audio, decode_image, decode_video
from tests.media_cases import bomb, noise, picture, saved, sound, turned, video

SPEC = MediaSpec()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "AVIF"])
def test_an_image_of_each_format_is_rgb(format: str) -> None:
    found = decode_image(picture((200, 30, 60), (16, 8), format=format), SPEC)
    assert (found.mode, found.size) == ("RGB", (16, 8))
    assert np.abs(np.asarray(found).astype(int) - [200, 30, 60]).max() < 25


@pytest.mark.parametrize(("mode", "color", "format", "expected"), [
    ("L", 100, "PNG", (100,) * 3), ("1", 1, "PNG", (255,) * 3), ("LA", (100, 255), "PNG", (100,) * 3),
    ("RGBA", (10, 20, 30, 255), "PNG", (10, 20, 30)), ("RGBA", (0, 0, 0, 0), "PNG", (255,) * 3),
    ("RGBA", (0, 0, 0, 128), "WEBP", (127,) * 3), ("LA", (0, 0), "PNG", (255,) * 3),
    ("CMYK", (255, 0, 0, 0), "TIFF", (0, 255, 255)), ("CMYK", (0, 255, 0, 0), "JPEG", (255, 0, 255)),
    ("I;16", 40000, "PNG", (156,) * 3), ("I;16", 200, "PNG", (0,) * 3), ("I;16", 65535, "TIFF", (255,) * 3),
    ("I", 40000, "TIFF", (156,) * 3), ("I", 200, "TIFF", (200,) * 3),
])  # fmt: skip
def test_every_kind_of_pixel_becomes_what_a_viewer_shows(
    mode: str, color: int | tuple[int, ...], format: str, expected: tuple[int, ...]
) -> None:
    found = decode_image(picture(color, mode=mode, format=format), SPEC)
    assert np.abs(np.asarray(found).astype(int) - expected).max() <= 6


def test_what_a_palette_leaves_transparent_is_white() -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 1), 1)
    for format in ("PNG", "GIF"):
        found = decode_image(saved(image, format, transparency=0), SPEC)
        assert (found.getpixel((0, 0)), found.getpixel((1, 1))) == ((255, 255, 255), (255, 0, 0))
    found = decode_image(saved(Image.new("RGB", (4, 4), "black"), transparency=(0, 0, 0)), SPEC)
    assert found.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "MPO"])
def test_of_an_animation_the_first_picture_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    found = decode_image(saved(frames[0], format, save_all=True, append_images=frames[1:]), SPEC)
    assert np.abs(np.asarray(found).astype(int) - [255, 0, 0]).max() < 10


@pytest.mark.parametrize(("orientation", "place"), [(1, (0, 0)), (3, (3, 1)), (6, (1, 0)), (8, (0, 3))])
def test_a_photo_is_turned_upright(orientation: int, place: tuple[int, int]) -> None:
    image = Image.new("RGB", (4, 2), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(saved(image, exif=exif), SPEC)
    assert found.size == ((4, 2) if orientation in (1, 3) else (2, 4))
    assert found.getpixel(place) == (255, 0, 0)


@pytest.mark.parametrize("content", [
    noise(0)[:200], saved(Image.open(__import__("io").BytesIO(noise(0, (64, 64)))), "JPEG")[:700], b"no image at all",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>", noise(0)[:20], b"\x89PNG\r\n\x1a\n", sound(0.1),
], ids=["half a png", "half a jpeg", "text", "svg", "header", "signature", "a sound"])  # fmt: skip
def test_a_damaged_image_is_refused(content: bytes) -> None:
    with pytest.raises(RowError, match=r"^has an image that cannot be decoded: \S"):
        decode_image(content, SPEC)


def test_no_other_program_is_started_for_an_image() -> None:
    with pytest.raises(RowError, match="cannot identify image file"):
        decode_image(saved(Image.new("RGB", (4, 4)), "EPS"), SPEC)


def test_a_small_file_of_a_huge_image_is_refused_before_it_is_decoded() -> None:
    content = bomb(20000, 2501)
    assert len(content) < 400_000
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(RowError, match=r"20000x2501 pixels, over data\.media\.max_pixels=50000000"):
            decode_image(content, SPEC)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10, "Pillow's own memory, in KiB"


def test_an_image_beyond_all_bounds_and_one_of_long_texts_are_refused_too() -> None:
    header = bytearray(picture(size=(1, 1)))
    header[16:24] = (60000).to_bytes(4, "big") * 2
    with pytest.raises(RowError, match="has an image"):
        decode_image(bytes(header), SPEC)
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * (80 << 20), zip=True)
    with pytest.raises(RowError, match="cannot be decoded"):
        decode_image(saved(Image.new("RGB", (4, 4)), pnginfo=info), SPEC)


def test_the_bound_on_pixels_is_the_last_size_taken() -> None:
    assert decode_image(picture(size=(10, 10)), MediaSpec(max_pixels=100)).size == (10, 10)
    with pytest.raises(RowError, match="10x10 pixels"):
        decode_image(picture(size=(10, 10)), MediaSpec(max_pixels=99))


@pytest.fixture(scope="module")
def demo(shared_data: Path) -> Path:
    return shared_data / "llamafactory_demo" / "mllm_demo_data"


@pytest.mark.parametrize(
    ("name", "seconds"), [("1.mp3", 4.032), ("2.wav", 2.9013125), ("3.flac", 5.855), ("4.mp3", 5.0)]
)
def test_real_sounds_have_as_many_samples_as_seconds(demo: Path, name: str, seconds: float) -> None:
    for rate in (16000, 24000):
        found = decode_audio((demo / name).read_bytes(), rate, SPEC)
        assert (found.dtype, found.ndim) == (np.float32, 1)
        assert abs(len(found) - seconds * rate) <= 1
        assert 0.01 < np.abs(found).max() < 1.1  # a lossy sound may exceed 1


def test_a_wav_at_its_own_rate_is_its_samples() -> None:
    found = decode_audio(sound(0.5), 16000, SPEC)
    expected = 0.5 * np.sin(np.arange(8000) * 0.05)
    assert len(found) == 8000
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("channels", [2, 6])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_channels_become_their_mean(channels: int, rate: int) -> None:
    mono = decode_audio(sound(0.5, rate=rate, level=0.9), 16000, SPEC)
    found = decode_audio(sound(0.5, rate=rate, channels=channels, level=0.9), 16000, SPEC)
    assert len(found) == len(mono)
    assert np.abs(found - mono).max() < 1e-4


def test_a_sound_that_is_too_long_ends_the_decoding_early() -> None:
    content = sound(600, rate=8000)
    tracemalloc.start()
    try:
        with pytest.raises(RowError, match=r"has audio of more than data\.media\.max_audio_seconds=1$"):
            decode_audio(content, 16000, MediaSpec(max_audio_seconds=1))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert len(decode_audio(sound(1.0), 16000, MediaSpec(max_audio_seconds=1))) == 16000


def test_a_slow_sound_is_not_made_fast_before_it_is_measured() -> None:
    content = sound(4000, rate=1)
    tracemalloc.start()
    try:
        with pytest.raises(RowError, match="has audio of more than"):
            decode_audio(content, 16000, MediaSpec(max_audio_seconds=10))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("content", "reason"), [
    (b"no sound", "has an audio that cannot be decoded"), (sound(0), "without sound"),
    (noise(0), "without sound|cannot be decoded"),
    (sound(0.5)[:30], "cannot be decoded"),
])  # fmt: skip
def test_what_has_no_sound_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        decode_audio(content, 16000, SPEC)


@pytest.mark.parametrize(("name", "seconds", "size"), [
    ("1.mp4", 9.72, (640, 360)), ("2.avi", 9.025, (320, 240)), ("3.mp4", 6.088, (640, 360)), ("4.mp4", 5.0, (224, 224)),
])  # fmt: skip
def test_frames_of_real_films_are_spread_evenly(demo: Path, name: str, seconds: float, size: tuple[int, int]) -> None:
    content = (demo / name).read_bytes()
    for most, expected in ((7, 7), (64, round(seconds * 2))):
        clip = decode_video(content, MediaSpec(max_frames=most))
        assert len(clip) == len(clip.times) == expected
        assert clip.duration == pytest.approx(seconds, abs=1e-3)
        assert clip.fps == pytest.approx(expected / seconds, rel=1e-3)
        assert np.diff(clip.times) == pytest.approx(seconds / expected, abs=0.05)
        assert all(frame.size == size for frame in clip)


def test_a_film_of_few_frames_has_them_all(tmp_path: Path) -> None:
    for frames in (1, 3):
        clip = decode_video(video(tmp_path / "few.mp4", frames=frames), MediaSpec(video_fps=10))
        assert len(clip) == frames


def test_a_film_that_does_not_start_at_zero_is_spread_evenly_too(tmp_path: Path) -> None:
    film = video(tmp_path / "late.ts", frames=60, first=500, format="mpegts", codec="mpeg2video", rate=25)
    clip = decode_video(film, SPEC)
    assert clip.times == pytest.approx([0, 0.48, 0.96, 1.44, 1.92], abs=0.05)


def test_a_film_is_turned_as_players_turn_it(tmp_path: Path) -> None:
    film = video(tmp_path / "phone.mp4")
    flat, upright = (decode_video(one, SPEC)[0] for one in (film, turned(film)))
    assert (flat.size, upright.size) == ((48, 32), (32, 48))
    for image, red, black in ((flat, (5, 16), (40, 16)), (upright, (16, 5), (16, 40))):
        assert np.abs(np.subtract(image.getpixel(red), (255, 0, 0))).max() < 30
        assert max(image.getpixel(black)) < 30


def test_a_film_that_ends_too_soon_is_refused(tmp_path: Path) -> None:
    whole = video(tmp_path / "whole.mp4", frames=60)
    streamed = video(tmp_path / "streamed.mp4", frames=60, movflags="faststart")
    assert len(decode_video(streamed, SPEC)) == 12
    for film in (whole, streamed):
        for part in (0.3, 0.6):
            with pytest.raises(RowError, match=r"cannot be decoded|ends after \d+ of its 60 frames"):
                decode_video(film[: int(len(film) * part)], SPEC)


@pytest.mark.parametrize(("content", "reason"), [
    (sound(0.5), "has a video file without pictures"), (b"no film", "has a video that cannot be decoded"),
    (b"", "has a video that cannot be decoded"),
])  # fmt: skip
def test_what_has_no_pictures_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        decode_video(content, SPEC)


def test_a_film_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    film = video(tmp_path / "large.mp4")
    with pytest.raises(RowError, match=r"has a video of 48x32 pixels, over data\.media\.max_pixels=1000"):
        decode_video(film, MediaSpec(max_pixels=1000))


def test_the_cover_of_a_song_is_no_film(demo: Path, tmp_path: Path) -> None:
    cover = picture(size=(16, 16), format="JPEG")
    frame = b"\0image/jpeg\0\x03\0" + cover
    tag = b"APIC" + len(frame).to_bytes(4, "big") + b"\0\0" + frame
    size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    song = b"ID3\x03\0\0" + size + tag + (demo / "1.mp3").read_bytes()
    with pytest.raises(RowError, match="has a video file without pictures"):
        decode_video(song, SPEC)
    assert abs(len(decode_audio(song, 16000, SPEC)) - 4.032 * 16000) <= 1


def test_a_film_without_sound_has_no_sound(demo: Path) -> None:
    with pytest.raises(RowError, match="without sound"):
        decode_audio((demo / "4.mp4").read_bytes(), 16000, SPEC)


@pytest.mark.parametrize(
    "decode", [decode_image, decode_video, lambda content, spec: decode_audio(content, 8000, spec)]
)
@pytest.mark.parametrize("seed", range(3))
def test_rubbish_in_a_good_file_is_a_row_error_or_none(
    decode: Callable[..., object], seed: int, tmp_path: Path
) -> None:
    random = np.random.default_rng(seed)
    for good in (noise(1), picture(format="JPEG", size=(40, 40)), sound(0.1), video(tmp_path / "a.mp4")):
        content = bytearray(good)
        for place in random.integers(0, len(content), 12):
            content[place] = int(random.integers(0, 256))
        with suppress(RowError):
            decode(bytes(content), SPEC)


def test_decoding_loads_no_model_library() -> None:
    code = (
        "import sys, rayswift.data.media.decoding; print(sorted(set(sys.modules) & {'torch', 'transformers', 'ray'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("playlist", [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://FILE\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile FILE\n",
])  # fmt: skip
def test_a_playlist_opens_no_other_file(tmp_path: Path, playlist: bytes) -> None:
    """FFmpeg's hls and concat would read what a row names: a file of the machine as a sound to train on."""
    path = tmp_path / "secret.wav"
    path.write_bytes(sound(0.1))
    assert len(decode_audio(path.read_bytes(), 16000, SPEC)) == 1600
    with pytest.raises(RowError, match="cannot be decoded"):
        decode_audio(playlist.replace(b"FILE", str(path).encode()), 16000, SPEC)
