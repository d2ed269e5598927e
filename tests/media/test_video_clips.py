import os
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from video_files import encode, numbered, numbers

from ldm_core.errors import UserError
from ldm_core.media.buckets import Bucket, fit
from ldm_core.media.clips import Clip, cut_clips, decode_clip, decode_clips
from ldm_core.media.parts import decode_parts
from ldm_core.media.video import VideoFacts, probe_video


def lasting(seconds):
    return VideoFacts(64, 48, 100, seconds, 100 / seconds, False, "mp4", "h264", False)


def test_clips_follow_each_other_and_the_rest_is_shorter():
    clips = cut_clips(lasting(5.0), fps=8, frames=17)  # 40 moments: 17 + 17 + 6, of which 5
    assert clips == [Clip(0.0, 17, 8), Clip(2.125, 17, 8), Clip(4.25, 5, 8)]
    assert [clip.name for clip in clips] == ["t=0.000+17@8", "t=2.125+17@8", "t=4.250+5@8"]


def test_no_clip_crosses_a_scene_change():
    clips = cut_clips(lasting(4.0), fps=8, frames=9, scenes=[9.0, 1.5, 0.0])
    assert clips == [
        *(Clip(0.0, 9, 8), Clip(1.125, 1, 8)),  # 12 moments: 9 + 3, of which 1
        *(Clip(1.5, 9, 8), Clip(2.625, 9, 8), Clip(3.75, 1, 8)),  # 20 moments
    ]


def test_overlapping_clips_stop_when_nothing_new_is_left():
    clips = cut_clips(lasting(21 / 8), fps=8, frames=9, stride=4)
    assert [clip.start_s * 8 for clip in clips] == [0, 4, 8, 12]
    assert {clip.frames for clip in clips} == {9}
    clips = cut_clips(lasting(24 / 8), fps=8, frames=9, stride=8)
    assert [(clip.start_s * 8, clip.frames) for clip in clips] == [(0, 9), (8, 9), (16, 5)]


@pytest.mark.parametrize("seconds", [0.001, 0.1, 0.5])
def test_a_video_shorter_than_a_clip_gives_one(seconds):
    (clip,) = cut_clips(lasting(seconds), fps=8, frames=17)
    assert clip == Clip(0.0, 1, 8)


def test_clips_cover_every_video_whatever_its_length():
    rng = np.random.default_rng(0)
    for _ in range(500):
        seconds, fps = rng.uniform(0.01, 30), rng.choice([1, 7.5, 8, 16, 23.976, 30])
        multiple, steps = int(rng.integers(1, 9)), int(rng.integers(0, 12))
        frames = 1 + multiple * steps
        scenes = sorted(rng.uniform(0, seconds, rng.integers(0, 4)))
        stride = None if rng.random() < 0.5 else int(rng.integers(1, frames + 1))
        clips = cut_clips(lasting(seconds), fps, frames, stride, scenes, multiple)
        edges = [0.0, *scenes, seconds]
        for begin, end in pairwise(edges):
            shot = [clip for clip in clips if begin <= clip.start_s < end]
            reached = begin
            for clip in shot:
                assert clip.start_s <= reached + 1e-9
                assert clip.times()[-1] < end or clip.frames == 1
                assert clip.frames <= frames
                assert (clip.frames - 1) % multiple == 0
                new = clip.start_s + clip.frames / fps
                assert new > reached
                reached = new
            assert end - reached < multiple / fps + 1e-9
        names = [clip.name for clip in clips]
        assert len(clips) == len(set(clips)) == len(set(names))


@pytest.mark.parametrize(
    "wrong",
    [{"fps": 0}, {"fps": -8}, {"frames": 16}, {"frames": 0}, {"stride": 0}, {"multiple": 0}],
)
def test_settings_that_make_no_clips_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        cut_clips(lasting(5.0), **{"fps": 8, "frames": 17, **wrong})


def test_all_clips_of_a_video_in_one_pass():
    data = encode(numbered(100), gop=10)
    clips = cut_clips(probe_video(data), fps=15, frames=9, stride=5, scenes=[1.0])
    together = list(decode_clips(data, clips))
    assert len(together) == len(clips)
    for clip, frames in zip(clips, together, strict=True):
        assert np.array_equal(frames, decode_clip(data, clip))
        assert numbers(frames) == [round(time * 30) for time in clip.times()]
    assert list(decode_clips(data, [])) == []
    with pytest.raises(ValueError, match="order"):
        list(decode_clips(data, clips[::-1]))


def test_only_the_frames_of_the_clips_at_hand_are_held():
    images = numbered(200, width=320, height=240)
    data, one = encode(images, "avi", gop=20), images[0].nbytes
    del images
    clips = cut_clips(probe_video(data), fps=30, frames=5)

    assert peak(lambda: decode_clip(data, clips[20])) < 16 * one
    assert peak(lambda: [len(frames) for frames in decode_clips(data, clips)]) < 32 * one


def test_of_a_clip_for_a_bucket_one_frame_is_held_at_the_videos_size():
    images = numbered(40, width=320, height=240)
    data, one = encode(images, "avi", gop=20), images[0].nbytes
    clip, bucket = Clip(0.0, 33, 30), Bucket(48, 80, 33)
    whole = decode_clip(data, clip)
    found = []
    assert (
        peak(lambda: found.extend(decode_parts(data, "video", [clip], bucket.name, 9))) < 12 * one
    )
    fitted, crop = fit(whole, bucket)
    assert np.array_equal(found[0].frames, fitted)
    assert (found[0].crop, found[0].height, found[0].width) == (crop, 240, 320)


def peak(work):
    """Bytes that Python and numpy held at once; the video library's own are a few frames."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts the kernel's threads")
def test_decoding_starts_no_threads_unless_told():
    data = encode(numbered(30, 320, 256))
    before = len(os.listdir("/proc/self/task"))
    alone, many = (decode_clips(data, [Clip(0.0, 5, 30)] * 2, threads=n) for n in (1, 3))
    next(alone)
    assert len(os.listdir("/proc/self/task")) == before
    next(many)
    assert len(os.listdir("/proc/self/task")) > before
