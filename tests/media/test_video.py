import io
import pickle

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image
from video_files import encode, numbered, picture

from ldm_core.errors import BadMedia
from ldm_core.media.clips import Clip, cut_clips, decode_clips
from ldm_core.media.video import probe_video, scene_changes

CONTAINERS = ["mp4", "mov", "matroska", "webm", "avi"]
PARSERS = {"mov": "mp4", "webm": "matroska"}
SDP = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n"


def reason(data, **limits):
    with pytest.raises(BadMedia) as caught:
        probe_video(data, **limits)
    assert caught.value.stage == "decode"
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("fps", [25, 30, 120])
def test_facts_of_every_container(container, fps):
    facts = probe_video(encode(numbered(50), container, fps=fps))
    assert (facts.width, facts.height, facts.frames) == (64, 48, 50)
    assert facts.seconds == pytest.approx(50 / fps, abs=2e-3)  # Matroska rounds to 1 ms
    assert facts.fps == pytest.approx(fps, rel=2e-3)
    assert not facts.variable_rate
    assert facts.container == PARSERS.get(container, container)
    assert not facts.has_audio


@pytest.mark.parametrize(
    ("container", "codec", "name"),
    [
        ("mp4", "libx264", "h264"),
        ("mp4", "libx265", "hevc"),
        ("mov", "mpeg4", "mpeg4"),
        ("webm", "libvpx", "vp8"),
        ("webm", "libvpx-vp9", "vp9"),
        ("matroska", "libsvtav1", "av1"),
        ("matroska", "ffv1", "ffv1"),
        ("avi", "mjpeg", "mjpeg"),
    ],
)
def test_codecs_have_one_name_whoever_wrote_them(container, codec, name):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = encode(numbered(10, 64, 64), container, codec=codec, pix_fmt=pix_fmt)
    facts = probe_video(data)
    assert (facts.codec, facts.frames) == (name, 10)
    (frames,) = decode_clips(data, [Clip(0.0, 10, 30)])
    assert frames.shape == (10, 64, 64, 3)


def test_one_frame_is_a_video():
    for container in CONTAINERS:
        facts = probe_video(encode(numbered(1), container))
        assert facts.frames == 1
        assert 0 < facts.seconds <= 0.2
        assert not facts.variable_rate


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_part_of_a_file_is_truncated(container, kept):
    data = encode(numbered(40), container)
    assert reason(data[: int(len(data) * kept)]) == "truncated"


def test_an_index_at_the_front_does_not_hide_the_cut():
    images = numbered(40)
    whole = encode(images, file_options={"moov_size": "20000"})
    assert whole.index(b"moov") < whole.index(b"mdat")
    assert probe_video(whole).frames == 40
    assert reason(whole[: len(whole) * 2 // 3]) == "truncated"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"just some words, named .mp4 by mistake", "not a video"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a video"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n", "not a video"),
        (SDP, "not a video"),
        (b"GIF89a\x01\0\x01\0\0\0\0;", "not a video"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "not a video"),
        (b"The free text of someone else, one wide road", "not a video"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "undecodable"),
        (b"\x1aE\xdf\xa3", "truncated"),
        (b"\x1aE\xdf\xa3\x80\x18S\x80g\x80", "no frames"),
    ],
)
def test_what_is_no_video_says_so(data, expected):
    assert reason(data) == expected


def test_a_playlist_in_disguise_reads_no_other_file(tmp_path):
    """The words that make a guessing parser follow a list, after the bytes of a container."""
    target = tmp_path / "secret.mp4"
    target.write_bytes(encode(numbered(5)))
    for beginning in (b"\0\0\0\x10ftypisom\0\0\0\0", b"\x1aE\xdf\xa3\x80", b"RIFF\0\0\0\0AVI "):
        text = f"\nffconcat version 1.0\nfile '{target}'\n#EXTM3U\n{target}\n".encode()
        assert reason(beginning + text) in ("undecodable", "truncated", "no video stream")


def test_sound_alone_has_no_video_stream():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), layout="mono")
        frame.sample_rate = 48_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert reason(buffer.getvalue()) == "no video stream"


def test_a_cover_picture_is_no_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=48_000, layout="mono")
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), layout="mono")
        samples.sample_rate = 48_000
        file.mux(cover.encode(av.VideoFrame.from_ndarray(picture(0), format="rgb24")))
        file.mux([*cover.encode(), *sound.encode(samples), *sound.encode()])
    assert reason(buffer.getvalue()) == "no video stream"


def test_a_codec_that_is_not_listed_is_refused_by_name():
    data = encode(numbered(10), "avi", codec="flv")
    with pytest.raises(BadMedia, match="undecodable: codec flv1; read: .*h264"):
        probe_video(data)


@pytest.mark.parametrize("container", ["matroska", "webm", "avi"])
def test_a_file_without_frames(container):
    assert reason(encode([], container, size=(64, 48))) == "no frames"


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "mpeg4"),
        ("webm", "libvpx-vp9"),
        ("matroska", "ffv1"),
        ("avi", "mjpeg"),
        ("avi", "png"),
    ],
)
def test_large_frames_are_refused(container, codec):
    pix_fmt = {"png": "rgb24", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    data = encode(numbered(5), container, codec=codec, pix_fmt=pix_fmt)
    assert reason(data, max_pixels=64 * 48 - 1) == "too large"
    assert probe_video(data, max_pixels=64 * 48).frames == 5


def test_opening_a_file_does_not_decode_a_pixel_bomb():
    """To learn a picture's format a decoder is tried; the size in the header is a small one."""
    bomb = io.BytesIO()
    Image.new("RGB", (400, 300)).save(bomb, "PNG")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as file:
        stream = file.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        packet = av.Packet(bomb.getvalue())
        packet.pts, packet.dts, packet.stream = 0, 0, stream
        file.mux(packet)
    with pytest.raises(BadMedia, match="too large: a frame is more than"):  # of a size not learnt
        probe_video(buffer.getvalue(), max_pixels=64 * 48)
    with pytest.raises(BadMedia, match="too large: 400 x 300 is more than"):
        probe_video(buffer.getvalue(), max_pixels=400 * 300 - 1)
    assert probe_video(buffer.getvalue(), max_pixels=400 * 300).width == 400


def test_length_and_time_are_bounded():
    data = encode(numbered(30))
    assert reason(data, max_seconds=0.99) == "too long"
    assert reason(data, seconds=0) == "timeout"
    assert probe_video(data, max_seconds=1.01).frames == 30


def test_a_title_in_another_encoding_does_no_harm():
    for container in ("mp4", "matroska"):
        data = encode(numbered(5), container, title="a title of some length")
        assert b"a title of some length" in data
        changed = data.replace(b"a title of some length", b"\xe9" * 22)
        assert probe_video(changed).frames == 5


def test_damaged_files_raise_bad_media_and_nothing_else():
    rng = np.random.default_rng(1)
    for container in CONTAINERS:
        data = encode(numbered(12), container, gop=4)
        for _ in range(30):
            damaged = bytearray(data)
            for position in rng.integers(12, len(data), size=6):
                damaged[position] = rng.integers(256)
            try:
                facts = probe_video(bytes(damaged), max_pixels=100_000, max_seconds=60, seconds=5)
                clips = cut_clips(facts, fps=30, frames=5)
                for frames in decode_clips(bytes(damaged), clips, max_pixels=100_000, seconds=5):
                    assert frames.dtype == np.uint8
            except BadMedia:
                continue


def scene(kind, count, start=0):
    """`count` pictures of one place: a moving bar on a background of its own."""
    tint = np.array([(0, 0, 0), (90, 20, -20), (-25, 60, 100)][kind])
    images = np.stack([picture(start + index) for index in range(count)])
    return list(np.clip(images.astype(int) + tint, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("container", CONTAINERS)
def test_scene_changes_are_found_where_they_are(container):
    images = scene(0, 31) + scene(1, 22) + scene(2, 27) + scene(0, 10)
    changes = scene_changes(encode(images, container))
    assert changes == pytest.approx([31 / 30, 53 / 30, 80 / 30], abs=1e-3)
    facts = probe_video(encode(images, container))
    clips = cut_clips(facts, fps=30, frames=9, scenes=changes, multiple=1)
    starts = [0, 9, 18, 27, 31, 40, 49, 53, 62, 71, 80, 89]
    assert [round(clip.start_s * 30) for clip in clips] == starts


def test_motion_and_flashes_are_no_scene_changes():
    flash = [np.full((48, 64, 3), 255, np.uint8)]
    images = scene(1, 20) + flash + scene(1, 20, start=20)
    assert scene_changes(encode(images)) == []
    whip = [np.roll(picture(3), 16 * index, axis=1) for index in range(20)]
    assert scene_changes(encode(whip)) == []


def test_a_slow_fade_is_no_scene_change():
    images = [np.full((48, 64, 3), 8 * index, np.uint8) for index in range(30)]
    assert scene_changes(encode(images)) == []
