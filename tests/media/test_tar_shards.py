import io
import json
import os
import tarfile

import numpy as np
import pytest
from media_files import captions_of, counted, fill, png, reasons_of, sample, tar_bytes

from ldm_core.errors import BadMedia, UserError
from ldm_core.media.decode import decode_image
from ldm_core.media.locators import read_media
from ldm_core.media.sources import list_media
from ldm_core.media.tar_members import BLOCK, read_members


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_members_with_one_key(tmp_path, format):
    key = "train/" + "long" * (20 if format == tarfile.USTAR_FORMAT else 80)
    members = [
        ("./000.jpg", b"not read by the lister"),
        ("./000.txt", "ein Bär\n".encode()),
        ("./000.cls", b"7"),
        (f"{key}.left.png", png(5)),
        ("001.mp4", b"a film"),
        (f"{key}.json", json.dumps({"caption": "from json", "url": "x"}).encode()),
        (f"{key}.txt", b"from txt"),
        ("001.json", json.dumps({"text": ["one", "two"], "weight": [3, 1]}).encode()),
        ("readme.txt", b"without a picture"),
        ("._000.jpg", b"left by macOS"),
    ]
    fill(tmp_path, {"a.tar": tar_bytes(members, format)})
    listing = list_media(str(tmp_path / "a.tar"))
    assert captions_of(listing) == {
        "a.tar/000": {"ein Bär": 1},
        "a.tar/001": {"one": 0.75, "two": 0.25},
        f"a.tar/{key}": {"from json": 1},
    }
    assert listing.rejects == []
    found = {entry.id: entry for entry in listing.entries}
    assert {id: read_media(entry.uri) for id, entry in found.items()} == {
        "a.tar/000": b"not read by the lister",
        "a.tar/001": b"a film",
        f"a.tar/{key}": png(5),
    }
    assert [entry.kind for entry in listing.entries] == ["image", "video", "image"]
    assert found["a.tar/001"].size == 6
    assert found["a.tar/001"].etag == str((tmp_path / "a.tar").stat().st_mtime_ns)


def test_no_name_leads_anywhere(tmp_path):
    special = {
        "hard.png": (tarfile.LNKTYPE, "/etc/passwd"),
        "soft.png": (tarfile.SYMTYPE, "../../etc/passwd"),
        "null.png": (tarfile.CHRTYPE, ""),
        "disk.png": (tarfile.BLKTYPE, ""),
        "pipe.png": (tarfile.FIFOTYPE, ""),
    }
    members = sample("good")
    for name, (kind, target) in special.items():
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        members.append(info)
    for name in ("../up.png", "a/../../up.png", "/abs.png", "in/..", "a/b/../c.png"):
        members.append((name, png()))
    fill(tmp_path, {"a.tar": tar_bytes(members)})
    listing = list_media(str(tmp_path / "a.tar"))
    assert list(captions_of(listing)) == ["a.tar/good"]
    assert set(reasons_of(listing).values()) == {"unsafe path"}
    assert len(listing.rejects) == len(special) + 5
    assert os.listdir(tmp_path) == ["a.tar"]


def test_two_pictures_with_one_key_are_neither(tmp_path):
    members = [*sample("a"), *sample("b"), *sample("a"), ("c.png", png()), ("c.jpg", png())]
    fill(tmp_path, {"x.tar": tar_bytes(members), "y.tar": tar_bytes(sample("a"))})
    listing = list_media(str(tmp_path))
    assert list(captions_of(listing)) == ["x.tar/b", "y.tar/a"]
    assert reasons_of(listing) == {"x.tar/a": "duplicate id", "x.tar/c": "duplicate id"}
    assert "#offset=" in listing.rejects[0].detail


def test_captions_that_cannot_be_used(tmp_path):
    bad = {
        "broken.json": b"{",
        "deep.json": b"[" * 100_000,
        "number.json": b'{"caption": 3}',
        "latin.txt": b"caf\xe9",
        "endless.txt": b"x" * (1 << 20) + b"y",
    }
    none = {"empty.txt": b"  ", "null.json": b'{"caption": null}', "list.json": b"[1]"}
    weights = {
        "negative.json": b'{"caption": ["a", "b"], "weight": [1, -1]}',
        "nan.json": b'{"caption": "a", "weight": NaN}',
    }
    members = [*sample("good")]
    for name, content in (bad | none | weights).items():
        members += [(name, content), (name.split(".")[0] + ".png", png())]
    fill(tmp_path, {"a.tar": tar_bytes([*members, ("silent.png", png())])})
    listing = list_media(str(tmp_path / "a.tar"))
    assert list(captions_of(listing)) == ["a.tar/good"]
    reasons = {id.removeprefix("a.tar/"): reason for id, reason in reasons_of(listing).items()}
    assert reasons == {
        **{name.split(".")[0]: "unreadable caption" for name in bad},
        **{name.split(".")[0]: "no caption" for name in none},
        **{name.split(".")[0]: "bad weight" for name in weights},
        "silent": "no caption",
    }


def members_until(data):
    """The members that can be located, and why there are no more."""
    found = []
    try:
        for member in read_members(io.BytesIO(data)):
            found.append(member)
    except BadMedia as bad:
        return found, bad.reason
    return found, ""


def test_a_cut_archive_keeps_what_is_whole_at_every_byte():
    whole = tar_bytes([*sample("a"), *sample("b"), *sample("c")])
    ends = [member.offset + member.size for member in read_members(io.BytesIO(whole))]
    last = -(-ends[-1] // BLOCK) * BLOCK
    for cut in [*range(0, last, 37), last, last + BLOCK - 1]:
        found, reason = members_until(whole[:cut])
        assert reason == "truncated archive"
        assert [m.offset + m.size for m in found] == [end for end in ends if end <= cut]
    assert len(list(read_members(io.BytesIO(whole[: last + BLOCK])))) == 6


def test_a_truncated_archive_is_named_and_the_rest_is_listed(tmp_path):
    whole = tar_bytes([*sample("a"), *sample("b"), *sample("c")])
    fill(tmp_path, {"x.tar": whole[: len(whole) // 2], "y.tar": tar_bytes(sample("a"))})
    fill(tmp_path, {"empty.tar": b"", "text.tar": b"no archive" * 100})
    third = [member.name for member in read_members(io.BytesIO(whole))].index("b.png")
    offset = list(read_members(io.BytesIO(whole)))[third].offset
    fill(tmp_path, {"x.tar": whole[: offset + 20]})
    listing = list_media(str(tmp_path))
    assert list(captions_of(listing)) == ["x.tar/a", "y.tar/a"]
    assert reasons_of(listing) == {
        "empty.tar": "truncated archive",
        "text.tar": "damaged archive",
        "x.tar": "truncated archive",
    }
    assert "'b.png' ends at" in listing.rejects[2].detail


def test_damage_ends_a_listing_loudly_and_never_hangs():
    whole = tar_bytes([*sample("a"), *sample("b" * 200), *sample("c")])
    names = [member.name for member in read_members(io.BytesIO(whole))]
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(whole)
        for position in rng.integers(0, len(whole), size=3):
            damaged[position] = rng.integers(256)
        found, reason = members_until(bytes(damaged))
        assert all(member.offset + member.size <= len(whole) for member in found)
        assert reason or len(found) == len(names)
        outcomes.add(reason)
    assert outcomes == {"", "damaged archive"}


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[148:156], block[156:157] = b" " * 8, kind
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "archive",
    [
        header(b"a.png", b"\xff" * 12, b"0"),  # a negative size, which would lead back
        header(b"a.png", b"-0000000512\0", b"0"),
        header(b"a.png", b"\x80" + b"\xff" * 11, b"0"),  # 2 ** 88 bytes
        header(b"x", b"00000000010\0", b"x") + b"not pax\n".ljust(BLOCK, b"\0"),
        header(b"x", b"00000000020\0", b"x")
        + b"16 size=99999999".ljust(BLOCK, b"\0")
        + header(b"a.png", b"1", b"0"),
        header(b"x", b"00000000020\0", b"x") + b"0 path=abcdefghi".ljust(BLOCK, b"\0"),
        header(b"x", b"00010000001\0", b"L") + bytes(2 << 20),  # a name of two megabytes
    ],
)
def test_hostile_headers(archive):
    with pytest.raises(BadMedia, match="damaged archive|truncated archive"):
        list(read_members(io.BytesIO(archive + bytes(2 * BLOCK))))


def test_sizes_beyond_octal_and_sparse_files():
    big = header(b"a.png", b"\x80" + (5).to_bytes(11, "big"), b"0") + b"12345".ljust(BLOCK, b"\0")
    sparse = b"24 GNU.sparse.major=1\n".ljust(BLOCK, b"\0")
    pax = header(b"x", b"%011o\0" % 22, b"x") + sparse + header(b"s.png", b"0" * 11, b"0")
    old = header(b"o.png", b"0" * 11, b"S")
    found = list(read_members(io.BytesIO(big + pax.replace(b"24 ", b"22 ") + old + bytes(1024))))
    assert [(member.name, member.size, member.is_plain) for member in found] == [
        ("a.png", 5, True),
        ("s.png", 0, False),
        ("o.png", 0, False),
    ]


def test_brace_patterns_and_wildcards(tmp_path):
    shards = {f"s/{i:03d}.tar": tar_bytes(sample(f"k{i}")) for i in range(9, 12)}
    fill(tmp_path, shards | {"t/x.tar": tar_bytes(sample("x"))})
    pair = ["009.tar/k9", "010.tar/k10"]
    assert list(captions_of(list_media(f"{tmp_path}/s/{{009..010}}.tar"))) == pair
    assert list(captions_of(list_media(f"{tmp_path}/s/0{{09,10}}.tar"))) == pair
    assert len(list_media(f"{tmp_path}/s/*.tar").entries) == 3
    assert list(captions_of(list_media(f"{tmp_path}/{{s/01?,t/*}}.tar"))) == [
        "s/010.tar/k10",
        "s/011.tar/k11",
        "t/x.tar/x",
    ]
    assert len(list_media(f"file://{tmp_path}").entries) == 4


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{008..012}.tar", "names 5 files, of which 2 are missing, such as .*008.tar"),
        ("{012..009}.tar", "012..009.* is no range"),
        ("{0..99999999}.tar", "is no range of 1 to 1000000 names"),
        ("{0..999}{0..9999}.tar", "more than 1000000 files"),
        ("*.tgz", "matches no file"),
    ],
)
def test_patterns_that_name_nothing(tmp_path, pattern, message):
    fill(tmp_path, {f"{i:03d}.tar": tar_bytes(sample("k")) for i in range(9, 12)})
    with pytest.raises(UserError, match=message):
        list_media(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.TAR.GZ", "a.tar.zst"])
def test_compressed_archives_are_refused_with_the_remedy(tmp_path, name):
    fill(tmp_path, {name: b"\x1f\x8b", "b.tar": tar_bytes(sample("a"))})
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=f"{name} is compressed.*unpack it"):
            list_media(str(source))


def test_a_worker_reads_the_bytes_of_its_member_and_no_others():
    pictures = {f"{i:03d}": os.urandom(20_000) for i in range(20)}
    members = [(f"{key}.png", data) for key, data in pictures.items()]
    members += [(f"{key}.txt", b"c") for key in pictures]
    folder, counts = counted("one-tar", {"a.tar": tar_bytes(members)})
    listing = list_media(f"{folder}/a.tar")
    assert counts["bytes"] < len(members) * 600  # headers and captions; 400,000 are pictures
    counts.clear()
    entry = listing.entries[7]
    assert read_media(entry.uri) == pictures["007"]
    assert counts == {"cat_file": 1, "bytes": 20_000}


def test_an_archive_that_shrank_is_no_bad_picture(tmp_path):
    data = tar_bytes(sample("a"))
    fill(tmp_path, {"a.tar": data})
    entry = list_media(str(tmp_path / "a.tar")).entries[0]
    assert decode_image(read_media(entry.uri)).shape == (8, 8, 3)
    fill(tmp_path, {"a.tar": data[:520]})
    with pytest.raises(UserError, match="is not as it was listed"):
        read_media(entry.uri)


def test_in_a_bucket(s3):
    import s3fs

    fs = s3fs.S3FileSystem()
    for shard in range(3):
        fs.pipe_file(f"{s3}/wds/{shard:02d}.tar", tar_bytes(sample("a", shard)))
    for source in (f"{s3}/wds", f"{s3}/wds/{{00..02}}.tar", f"{s3}/wds/*.tar"):
        listing = list_media(source)
        assert [entry.id for entry in listing.entries] == [f"{i:02d}.tar/a" for i in range(3)]
        assert [read_media(entry.uri) for entry in listing.entries] == [png(i) for i in range(3)]
    before = listing.entries[1]
    fs.pipe_file(f"{s3}/wds/01.tar", tar_bytes(sample("a", 77)))
    after = list_media(f"{s3}/wds/01.tar").entries[0]
    assert (after.id, after.uri, after.size) == (before.id, before.uri, before.size)
    assert after.etag != before.etag
