import csv
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm_core.errors import BadMedia, UserError
from ldm_core.media.decode import decode_image
from ldm_core.media.folder import list_captioned_images, read_bytes

FILES = ["a.png", "deep/er/b c.JPG", "deep/ü[1].webp"]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for file in FILES:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (9, 9, 9)).save(root / file)
    return root


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def captions_of(listing):
    return {image.id: image.captions for image in listing.images}


EXPECTED = {file: (f"picture {index}",) for index, file in enumerate(FILES)}


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
@pytest.mark.parametrize("column", ["text", "caption"])
def test_json_lines(folder, name, column):
    rows = [{"file_name": file, column: texts[0], "more": 1} for file, texts in EXPECTED.items()]
    write_jsonl(folder / name, rows)
    listing = list_captioned_images(str(folder))
    assert captions_of(listing) == EXPECTED
    assert listing.rejects == []
    assert all(decode_image(read_bytes(image.uri)).shape == (8, 8, 3) for image in listing.images)


@pytest.mark.parametrize(
    ("name", "columns"), [("captions.csv", ("image", "caption")), ("metadata.csv", None)]
)
def test_csv_as_spreadsheets_write_it(folder, name, columns):
    with (folder / name).open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns or ("file_name", "text"))
        writer.writerows((f"./{id}", f" {texts[0]}\n") for id, texts in EXPECTED.items())
    assert captions_of(list_captioned_images(str(folder))) == EXPECTED


def test_parquet_with_lists_of_captions(folder):
    captions = [["one", "two", "one"], ["three"], None]
    pq.write_table(pa.table({"file": FILES, "captions": captions}), folder / "captions.parquet")
    listing = list_captioned_images(f"file://{folder}")
    assert captions_of(listing) == {FILES[0]: ("one", "two"), FILES[1]: ("three",)}
    assert [(r.id, r.reason) for r in listing.rejects] == [(FILES[2], "no caption")]


def test_text_files_beside_the_pictures(folder):
    for file, (caption,) in EXPECTED.items():
        (folder / file).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(folder / "deep" / "z.png")
    Image.new("RGB", (8, 8)).save(folder / "y.png")
    (folder / "y.txt").write_bytes(b"caf\xe9")
    (folder / "README.txt").write_text("not a caption")
    listing = list_captioned_images(str(folder))
    assert captions_of(listing) == EXPECTED
    assert [(r.id, r.reason) for r in listing.rejects] == [
        ("deep/z.png", "no caption"),
        ("y.png", "unreadable caption"),
    ]


def test_every_row_and_picture_ends_in_one_place(folder):
    (folder / "clip.mp4").write_bytes(b"x")
    rows = [
        {"file": "a.png", "caption": "first"},
        {"file": "a.png", "caption": ["second", "first", ""]},
        {"file": FILES[1], "caption": "  "},
        {"file": "gone.png", "caption": "missing"},
        {"file": "../a.png", "caption": "outside"},
        {"file": "/etc/passwd.png", "caption": "outside"},
        {"file": "deep/../../x.png", "caption": "outside"},
        {"file": "clip.mp4", "caption": "a film"},
    ]
    write_jsonl(folder / "captions.jsonl", rows)
    listing = list_captioned_images(str(folder))
    assert captions_of(listing) == {"a.png": ("first", "second")}
    reasons = {reject.id: reject.reason for reject in listing.rejects}
    assert reasons == {
        FILES[1]: "no caption",
        FILES[2]: "no caption",
        "gone.png": "file missing",
        "../a.png": "path outside folder",
        "/etc/passwd.png": "path outside folder",
        "../x.png": "path outside folder",
        "clip.mp4": "not an image file",
    }
    assert all(reject.stage == "list" for reject in listing.rejects)
    assert [reject.id for reject in listing.rejects] == sorted(reasons)


def refused(folder):
    with pytest.raises(UserError) as caught:
        list_captioned_images(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "captions.jsonl",
            '{"file": "a.png", "caption": "x"}\n{oops',
            "captions.jsonl:2: not JSON",
        ),
        (
            "captions.jsonl",
            '{"path": "a.png", "caption": "x"}',
            "found path, caption, expected file",
        ),
        ("captions.jsonl", '["a.png", "x"]', "captions.jsonl:1: ['a.png', 'x'] is not a JSON"),
        ("captions.jsonl", '{"file": "a.png", "caption": 3}', "captions.jsonl:1: caption is 3"),
        ("captions.jsonl", '{"file": null, "caption": "x"}', "captions.jsonl:1: file is None"),
        ("captions.csv", "file,title\na.png,x\n", "found file, title, expected caption or text"),
        ("captions.csv", "file,caption\na.png,x, and y\n", "captions.csv:2: more fields"),
        (
            "metadata.csv",
            "file,text\na.png,x\n",
            "no file column; found file, text, expected file_",
        ),
        ("captions.parquet", "PAR0", "captions.parquet is not a Parquet file"),
        ("captions.jsonl", '{"file": "b.png", "caption": "x"}', "none of 4 entries"),
    ],
)
def test_bad_tables_are_refused_with_their_place(folder, name, content, message):
    (folder / name).write_text(content)
    assert message in refused(folder)


def test_parquet_columns_are_checked(folder):
    pq.write_table(pa.table({"file": FILES, "label": FILES}), folder / "captions.parquet")
    assert "found file, label, expected caption" in refused(folder)


def test_two_tables_are_ambiguous(folder):
    for name in ("captions.jsonl", "metadata.jsonl"):
        write_jsonl(folder / name, [{"file_name": "a.png", "text": "x"}])
    assert "captions.jsonl and metadata.jsonl" in refused(folder)


def test_folders_that_hold_nothing_usable(folder, tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "3 pictures but no captions: add" in refused(folder)
    assert "is a file" in refused(folder / "a.png")
    assert "cannot be opened" in refused("gopherspace://bucket/x")
    for file in FILES:
        (folder / file).unlink()
    (folder / "notes.md").write_text("hello")
    assert "holds 1 files but no pictures" in refused(folder)


def test_torture_folder(tmp_path):
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    red.save(tmp_path / "good.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    red.quantize(4).save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(np.full((20, 40), 40_000, np.uint16)).save(tmp_path / "deep.png")
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    (tmp_path / "zero.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("this is not a picture")
    names = [*sorted(path.name for path in tmp_path.iterdir()), "nowhere.png"]
    write_jsonl(tmp_path / "captions.jsonl", [{"file": n, "caption": f"a {n}"} for n in names])

    listing = list_captioned_images(str(tmp_path))
    outcomes = Counter(reject.reason for reject in listing.rejects)
    pictures = {}
    for image in listing.images:
        try:
            pictures[image.id] = decode_image(read_bytes(image.uri))
        except BadMedia as bad:
            outcomes[bad.reason] += 1
    assert outcomes == {"file missing": 1, "truncated": 1, "empty file": 1, "not an image": 1}
    assert len(pictures) + outcomes.total() == len(names)
    assert pictures["rotated.jpg"].shape == (40, 20, 3)
    assert (pictures["palette.png"] == 255).all()
    assert (pictures["deep.png"] == round(40_000 / 257)).all()
    assert pictures["cmyk.jpg"][10, 10, 0] > 240
