import io

import av
import numpy as np
import pytest
from video_files import encode, numbered, numbers

from ldm_core.errors import BadMedia
from ldm_core.media.clips import Clip, decode_clip, decode_clips


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("matroska", "libx264"),
        ("mov", "mjpeg"),
        ("avi", "mjpeg"),
        ("webm", "libvpx-vp9"),
    ],
)
def test_damage_spoils_the_clips_it_touches_and_no_others(container, codec):
    """Zeros in the middle: what lies before and after, up to the next key frame, is whole."""
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    how = {"codec": codec, "pix_fmt": pix_fmt, "gop": 10, "b_frames": 0}
    data = encode(numbered(90), container, options={"sc_threshold": "0"}, **how)
    damaged = with_packets_changed(
        data, range(45, 49), lambda packet: packet[:4] + bytes(len(packet) - 4)
    )
    clips = [Clip(start / 30, 9, 30) for start in (0, 40, 50)]
    decoded = decode_clips(damaged, clips)
    assert numbers(next(decoded)) == list(range(9))
    with pytest.raises(BadMedia) as caught:
        list(decoded)
    assert (caught.value.stage, caught.value.reason) == ("decode", "undecodable")
    assert numbers(decode_clip(damaged, clips[2])) == list(range(50, 59))


def test_what_is_made_from_a_damaged_frame_is_damaged():
    """A few wrong bits: the decoder patches that frame, marks it, and goes on from it unmarked."""
    rng = np.random.default_rng(0)
    noise = rng.integers(-25, 25, (60, 96, 128, 3))
    images = np.clip(np.stack(numbered(60, 128, 96)) + noise, 0, 255).astype(np.uint8)
    data = encode(images, gop=10, b_frames=0, options={"sc_threshold": "0"})
    middle = rng.bytes(12)
    damaged = with_packets_changed(
        data,
        [33],
        lambda packet: packet[: len(packet) // 2] + middle + packet[len(packet) // 2 + 12 :],
    )
    for start, frames in ((31, 5), (35, 2), (36, 9)):
        with pytest.raises(BadMedia, match="undecodable: damage at"):
            decode_clip(damaged, Clip(start / 30, frames, 30))
    for start in (20, 28, 40):
        assert numbers(decode_clip(damaged, Clip(start / 30, 5, 30))) == list(
            range(start, start + 5)
        )

    around = [Clip(start / 30, 5, 30) for start in (20, 41)]  # in one pass over the damage
    assert numbers(list(decode_clips(damaged, around))[1]) == list(range(41, 46))


def with_packets_changed(data, which, change):
    """The video's packets with those indices changed in place."""
    with av.open(io.BytesIO(data)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0)]
    place, changed = 0, bytearray(data)
    for index, packet in enumerate(packets):
        place = data.index(packet, place)
        if index in which:
            changed[place : place + len(packet)] = change(packet)
        place += len(packet)
    assert len(changed) == len(data)
    return bytes(changed)


def test_frames_of_two_sizes_are_no_clip():
    small, large = (encode(numbered(8, *size), "webm") for size in ((64, 48), (320, 256)))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm") as joined:
        stream = None
        for order, data in enumerate((small, large)):
            with av.open(io.BytesIO(data)) as file:
                stream = stream or joined.add_stream_from_template(file.streams.video[0])
                for packet in file.demux(video=0):
                    if packet.size:
                        packet.pts += 267 * order
                        packet.dts, packet.stream = packet.pts, stream
                        joined.mux(packet)
    data = buffer.getvalue()
    assert numbers(decode_clip(data, Clip(0.0, 5, 30))) == list(range(5))
    with pytest.raises(BadMedia, match="undecodable.*frames of"):
        decode_clip(data, Clip(0.0, 13, 30))
    with pytest.raises(BadMedia):  # the decoder's bound holds for the larger ones too
        decode_clip(data, Clip(8.5 / 30, 5, 30), max_pixels=64 * 48)


def test_decoding_has_a_time_budget():
    data = encode(numbered(30))
    with pytest.raises(BadMedia) as caught:
        decode_clip(data, Clip(0.0, 17, 30), seconds=0)
    assert caught.value.reason == "timeout"
