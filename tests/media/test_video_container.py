import pytest
from video_files import encode, numbered

from ldm_core.errors import BadMedia
from ldm_core.media.video import probe_video
from ldm_core.media.video_container import check_container

FTYP = b"\0\0\0\x10ftypisom\0\0\0\0"


def box(kind, content, size=None):
    return (8 + len(content) if size is None else size).to_bytes(4) + kind + content


def is_cut(data):
    try:
        check_container(data)
    except BadMedia as error:
        return error.reason == "truncated"
    return False


@pytest.mark.parametrize(
    "data",
    [
        FTYP + box(b"mdat", bytes(50)) + box(b"moov", bytes(40)),
        box(b"wide", b"") + box(b"mdat", bytes(50)) + box(b"moov", bytes(40)),
        box(b"free", bytes(300)) + box(b"moov", bytes(40)),
        FTYP + box(b"mdat", (66).to_bytes(8) + bytes(50), size=1),  # a length of 64 bits
    ],
    ids=["index last", "QuickTime", "reserved room", "64 bits"],
)
def test_boxes_must_end_within_the_file(data):
    assert check_container(data) == "mp4"
    for cut in (1, 20, 40):
        assert is_cut(data[:-cut])


def test_a_cut_within_a_box_header_is_seen():
    assert is_cut(FTYP + box(b"mdat", bytes(4), size=1))
    assert is_cut(FTYP + box(b"moov", b"", size=50))


def test_a_last_box_may_be_open_or_unknown():
    assert check_container(FTYP + box(b"mdat", bytes(50), size=0)) == "mp4"
    whole = FTYP + box(b"moov", bytes(40))
    for appended in (b"SEFH\x01\0\0\0 a camera's own words", bytes(100), b"\0\0\0\x02tail" * 4):
        assert not is_cut(whole + appended)


def test_a_live_recording_does_not_know_its_length():
    """Its segment's size is unknown: a copy that ends early is a shorter video."""
    data = encode(numbered(60), "webm", gop=6, file_options={"live": "1"})
    assert probe_video(data).frames == 60
    assert 20 < probe_video(data[: len(data) // 2]).frames < 60


def test_every_cut_of_a_recording_with_a_known_length_is_seen():
    for container in ("webm", "avi"):
        data = encode(numbered(3), container)
        assert not is_cut(data)
        assert all(is_cut(data[:length]) for length in range(12, len(data)))
