import io
import struct

import av
import numpy as np
import pytest
from video_files import encode, numbered, numbers, with_duration

from ldm_core.errors import BadMedia
from ldm_core.media.clips import Clip, cut_clips, decode_clip, decode_clips
from ldm_core.media.video import probe_video

CONTAINERS = ["mp4", "mov", "matroska", "webm", "avi"]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("fps", [8, 24, 30, 60])
def test_each_moment_shows_the_frame_on_screen_then(container, fps):
    data = encode(numbered(40), container)  # 30 frames a second
    clip = Clip(0.0, int(40 / 30 * fps), fps)
    expected = [int(index * 30 / fps + 1e-9) for index in range(clip.frames)]
    frames = decode_clip(data, clip)
    assert (frames.dtype, frames.shape) == (np.uint8, (clip.frames, 48, 64, 3))
    assert numbers(frames) == expected


@pytest.mark.parametrize("container", CONTAINERS)
def test_any_start_leads_to_the_right_frames(container):
    data = encode(numbered(90), container, gop=12, b_frames=0 if container == "webm" else 2)
    for start in range(0, 85, 7):
        assert numbers(decode_clip(data, Clip(start / 30, 5, 30))) == list(range(start, start + 5))


@pytest.mark.parametrize(
    ("codec", "parameters"),
    [
        ("libx264", {"x264-params": "open-gop=1:bframes=3:keyint=12:scenecut=0:log=-1"}),
        ("libx265", {"x265-params": "open-gop=1:bframes=4:keyint=12:scenecut=0:log-level=none"}),
        ("libx264", {"x264-params": "intra-refresh=1:keyint=12:log=-1"}),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_key_frames_that_frames_before_them_need(container, codec, parameters):
    data = encode(numbered(90, 64, 64), container, codec=codec, options=parameters)
    for start in range(1, 85, 5):
        assert numbers(decode_clip(data, Clip(start / 30, 5, 30))) == list(range(start, start + 5))


@pytest.mark.parametrize(
    ("container", "index", "instead", "how"),
    [
        ("avi", b"idx1", b"JUNK", {}),
        ("matroska", b"\x1cS\xbbk", b"\x1cS\xbbl", {}),
        ("mp4", b"mfra", b"free", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_a_file_without_an_index(container, index, instead, how):
    data = encode(numbered(90), container, gop=12, file_options=how)
    assert index in data
    data = data.replace(index, instead)
    assert probe_video(data).frames == 90
    for start in range(0, 85, 14):
        assert numbers(decode_clip(data, Clip(start / 30, 5, 30))) == list(range(start, start + 5))


def test_frames_that_an_edit_list_cuts_off_are_not_shown():
    data = encode(numbered(40), gop=12)
    place = data.index(b"elst") + 12
    lasts, first, rate = struct.unpack_from(">3i", data, place)
    edit = struct.pack(">3i", lasts * 3 // 4, first + 10 * 512, rate)  # ten frames of 1/15360 s
    edited = data[:place] + edit + data[place + len(edit) :]
    facts = probe_video(edited)
    assert facts.frames == 30
    assert facts.seconds == pytest.approx(1.0, abs=1e-3)
    assert numbers(decode_clip(edited, Clip(0.0, 30, 30))) == list(range(10, 40))
    assert numbers(decode_clip(edited, Clip(0.5, 9, 30))) == list(range(25, 34))


@pytest.mark.parametrize(("count", "seconds"), [(1, 1 / 25), (10, 1 / 3)])
def test_a_last_frame_that_does_not_say_how_long_it_stays(count, seconds):
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(encode(numbered(count), "webm"))) as file,
        av.open(buffer, "w", format="webm") as copy,
    ):
        stream = copy.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            packet.stream, packet.duration = stream, 0
            copy.mux([packet] if packet.size else [])
    data = buffer.getvalue().replace(b"\x23\xe3\x83", b"\x23\xe3\x82")  # the default duration
    facts = probe_video(data)
    assert facts.seconds == pytest.approx(seconds, abs=1e-3)
    clips = cut_clips(facts, fps=60, frames=5)
    shown = [number for frames in decode_clips(data, clips) for number in numbers(frames)]
    assert shown == [index // 2 for index in range(len(shown))]
    assert len(shown) >= 2 * count - 3


def test_time_is_counted_from_the_first_frame():
    data = encode(numbered(40), ticks=list(range(150, 190)), tick="1/30")
    assert probe_video(data).seconds == pytest.approx(40 / 30, abs=1e-3)
    for start in (0, 17):
        assert numbers(decode_clip(data, Clip(start / 30, 9, 30))) == list(range(start, start + 9))


@pytest.mark.parametrize("container", ["mp4", "matroska", "webm", "avi"])
def test_frames_that_stay_for_unequal_times(container):
    gaps = 2 * np.random.default_rng(3).integers(5, 100, size=30)  # milliseconds
    ticks = [0, *np.cumsum(gaps).tolist()]
    data = encode(numbered(31), container, ticks=ticks, tick="1/1000")
    facts = probe_video(data)
    assert facts.variable_rate
    assert facts.frames == 31
    times = [index / 25 for index in range(int(ticks[-1] / 1000 * 25))]
    expected = [int(np.searchsorted(ticks, time * 1000 + 1, side="right")) - 1 for time in times]
    assert numbers(decode_clip(data, Clip(0.0, len(times), 25))) == expected
    middle = times[40:50]
    assert numbers(decode_clip(data, Clip(middle[0], 10, 25))) == expected[40:50]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("factor", [0.25, 10])
def test_a_header_may_lie_about_the_length(container, factor):
    data = encode(numbered(60), container, gop=12)
    lying = with_duration(data, container, factor)
    assert lying != data
    assert probe_video(lying) == probe_video(data)
    assert numbers(decode_clip(lying, Clip(0.0, 60, 30))) == list(range(60))
    assert numbers(decode_clip(lying, Clip(50 / 30, 10, 30))) == list(range(50, 60))


def test_a_clip_beyond_the_end_is_not_made_up():
    data = encode(numbered(30))
    with pytest.raises(BadMedia, match="no frame at 1.0"):
        decode_clip(data, Clip(0.5, 17, 30))
    assert numbers(decode_clip(data, Clip(29 / 30, 1, 30))) == [29]
