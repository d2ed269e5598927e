import numpy as np
import pyarrow as pa
import pytest
import torch
from small_store import small_store, text_rows

from ldm_core.errors import BadMedia, UserError
from ldm_core.latents.codec import (
    BLOCK,
    INT8_DTYPE,
    decode_column,
    decode_embedding,
    decode_int8,
    encode_embedding,
    encode_int8,
)
from ldm_core.latents.describe import describe
from ldm_core.latents.reader import LatentReader
from ldm_core.latents.rewrite import delete_rows
from ldm_core.latents.schema import ARRAY_DTYPE, TEXTS, decode_array, encode_array
from ldm_core.latents.store import LatentStore

WIDTH, PADDED = 4096, 256  # T5-XXL, and the tokens a padded store would keep


def gaussian(rng, length, width):
    return rng.normal(size=(length, width))


def laplace(rng, length, width):
    return rng.laplace(size=(length, width))


def outliers(count):
    """Rows in which the same `count` channels are 50 times larger, as in T5."""

    def draw(rng, length, width):
        values = rng.normal(size=(length, width))
        values[:, rng.choice(width, count, replace=False)] *= 50
        return values

    return draw


ROWS = {
    "gaussian": gaussian,
    "laplace": laplace,
    **{f"{count} outliers": outliers(count) for count in (1, 4, 16, 64, 256, 1024)},
}


def tensor(values):
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def relative_error(values, shape, data):
    exact = np.asarray(values, dtype=np.float64)
    return np.linalg.norm(exact - decode_int8(data, shape)) / np.linalg.norm(exact)


class TestError:
    @pytest.mark.parametrize("kind", ROWS)
    def test_is_at_most_a_hundredth_of_every_caption(self, kind):
        rng = np.random.default_rng(0)
        for length in (1, 20, 33, 60):
            for scale in (1e-2, 1, 30):
                values = scale * ROWS[kind](rng, length, WIDTH)
                data, told = encode_int8(tensor(values))
                found = relative_error(values, values.shape, data)
                assert told == pytest.approx(found, rel=0.01)
                assert found <= 0.01

    def test_of_even_values_is_that_of_rounding(self):
        """Uniform on [-1, 1]: variance 1/3, steps of nearly 1/127, an error of 1/(127 sqrt(12))."""
        values = np.random.default_rng(1).uniform(-1, 1, size=(40, WIDTH))
        values.reshape(-1, BLOCK)[:, 0] = 1  # every block's largest
        _, found = encode_int8(tensor(values))
        share = (BLOCK - 1) / BLOCK
        expected = share**0.5 / 127 / 12**0.5 / (share / 3 + 1 / BLOCK) ** 0.5
        assert found == pytest.approx(expected, rel=0.02)

    def test_has_a_bound_whatever_the_values(self):
        rng = np.random.default_rng(2)
        for _ in range(200):
            length, width = rng.integers(1, 8), rng.integers(1, 100)
            values = rng.normal(size=(length, width)) ** rng.integers(1, 12)
            values = np.clip(values * 10.0 ** rng.uniform(-2, 3), -65000, 65000)
            data, found = encode_int8(tensor(values))
            assert found <= BLOCK**0.5 / 254 + 2e-3  # the rest: 16-bit steps and results
            padded = np.pad(values, ((0, 0), (0, -width % BLOCK)))
            peaks = np.abs(padded.reshape(length, -1, BLOCK)).max(-1)
            half_step = np.repeat(peaks, BLOCK, axis=1)[:, :width] / 254
            off = np.abs(values - decode_int8(data, values.shape))
            assert (off <= half_step * 1.002 + np.abs(values) * 2e-3 + 1e-7).all()

    def test_near_the_bottom_of_16_bits_it_is_no_coarser_than_they_are(self):
        smallest = 2.0**-24
        values = np.random.default_rng(3).integers(-40, 41, size=(6, 64)) * smallest
        data, _ = encode_int8(tensor(values))
        np.testing.assert_array_equal(decode_int8(data, values.shape), values)

    def test_the_largest_numbers_of_16_bits_stay_finite(self):
        for largest in (65504.0, 65500.0, 65470.0, 60000.0):
            values = torch.tensor([[largest, -largest, 1.0, 0.0]])
            data, found = encode_int8(values)
            assert np.isfinite(decode_int8(data, (1, 4))).all()
            assert found < 1e-3

    def test_what_vanishes_altogether_is_wholly_off(self):
        data, found = encode_int8(torch.full((2, 20), 1e-30))
        assert found == 1
        assert not decode_int8(data, (2, 20)).any()

    def test_zeros_have_none(self):
        data, found = encode_int8(torch.zeros(3, 40))
        assert found == 0
        assert not decode_int8(data, (3, 40)).any()


class TestLayout:
    def test_by_hand(self):
        """Two blocks, steps 2 and 0.5, of a row one channel longer than a block."""
        row = torch.arange(-8, 8).float() * 2
        row[0] = -254.0
        values = torch.cat([row, torch.tensor([-63.5])])[None]
        data, found = encode_int8(values)
        levels = [-127, *range(-7, 8), -127]
        expected = np.array([2, 0.5], "<f2").tobytes() + np.array(levels, "i1").tobytes()
        assert data == expected
        assert found == 0
        np.testing.assert_array_equal(decode_int8(data, (1, 17)), values)

    def test_cells_end_to_end_are_rows_end_to_end(self):
        rng = np.random.default_rng(4)
        parts = [tensor(rng.normal(size=(length, 41))) for length in (3, 1, 5)]
        joined = b"".join(encode_int8(part)[0] for part in parts)
        assert joined == encode_int8(torch.cat(parts))[0]
        rows = np.concatenate([decode_int8(encode_int8(part)[0], part.shape) for part in parts])
        np.testing.assert_array_equal(decode_int8(joined, (-1, 41)), rows)

    def test_what_was_decoded_encodes_to_itself(self):
        """Exact where the steps are powers of two: no drift over generations of a store."""
        rng = np.random.default_rng(5)
        levels = rng.integers(-127, 128, size=(9, 4, BLOCK))
        levels[..., 0] = 127
        steps = 2.0 ** rng.integers(-10, 8, size=(9, 4, 1))
        values = tensor((levels * steps).reshape(9, -1))
        data, found = encode_int8(values)
        assert found == 0
        np.testing.assert_array_equal(decode_int8(data, values.shape), values)

    def test_scaling_by_a_power_of_two_scales_the_result(self):
        values = tensor(np.random.default_rng(6).laplace(size=(7, 200)))
        one = decode_int8(encode_int8(values)[0], values.shape)
        eight = decode_int8(encode_int8(values * 8)[0], values.shape)
        np.testing.assert_array_equal(eight, one * 8)
        np.testing.assert_array_equal(decode_int8(encode_int8(-values)[0], values.shape), -one)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 7e4])
    def test_refuses_what_16_bits_refuse(self, bad):
        values = torch.zeros(2, 20)
        values[1, 3] = bad
        with pytest.raises(BadMedia) as here:
            encode_int8(values)
        with pytest.raises(BadMedia) as there:
            encode_array(values)
        assert str(here.value) == str(there.value)


class TestBytes:
    def test_unpadded_a_quarter_and_in_8_bits_an_eighth_of_the_padded_16_bits(self):
        lengths = np.random.default_rng(7).integers(20, 61, size=40)
        rng = np.random.default_rng(8)
        captions = [tensor(rng.normal(size=(length, WIDTH))) for length in lengths]
        padded = len(lengths) * PADDED * WIDTH * 2
        unpadded = sum(len(encode_array(caption)) for caption in captions)
        small = sum(len(encode_int8(caption)[0]) for caption in captions)
        assert unpadded / padded == lengths.mean() / PADDED
        assert unpadded / padded <= 1 / 4
        assert small / unpadded == (1 + 2 / BLOCK) / 2
        assert small / padded <= 1 / 8


class TestDispatch:
    def test_by_dtype(self):
        values = tensor(np.random.default_rng(9).normal(size=(4, 33)))
        half, small = encode_array(values), encode_int8(values)[0]
        assert encode_embedding(values, ARRAY_DTYPE) == half
        assert encode_embedding(values, INT8_DTYPE) == small
        np.testing.assert_array_equal(
            decode_embedding(half, (4, 33), ARRAY_DTYPE), decode_array(half, (4, 33))
        )
        np.testing.assert_array_equal(
            decode_embedding(small, (4, 33), INT8_DTYPE), decode_int8(small, (4, 33))
        )

    def test_an_unknown_dtype_is_refused(self):
        with pytest.raises(UserError, match="'int4', this program has float16, int8-b16"):
            decode_embedding(b"", (0, 4), "int4")
        with pytest.raises(UserError, match="'int4', this program has float16, int8-b16"):
            encode_embedding(torch.zeros(1, 4), "int4")

    @pytest.mark.parametrize("count", [1, 63, 64, 65, 300])
    @pytest.mark.parametrize("chunk", [7, 1000])
    def test_a_column_of_mixed_dtypes_is_its_cells_end_to_end(self, count, chunk):
        rng = np.random.default_rng(count)
        parts = [tensor(rng.normal(size=(rng.integers(1, 5), 21))) for _ in range(count)]
        switches = np.cumsum(rng.random(count) < 0.1) % 2  # runs of some ten cells
        dtypes = [(ARRAY_DTYPE, INT8_DTYPE)[i] for i in switches]
        cells = [encode_embedding(*pair) for pair in zip(parts, dtypes, strict=True)]
        expected = [
            decode_embedding(cell, part.shape, dtype)
            for cell, part, dtype in zip(cells, parts, dtypes, strict=True)
        ]
        starts = range(0, count, chunk)
        found = decode_column(
            pa.chunked_array([pa.array(cells[i : i + chunk], pa.binary()) for i in starts]),
            pa.chunked_array([dtypes]),
            np.array([len(part) for part in parts]),
            21,
        )
        assert found.dtype == torch.float16
        np.testing.assert_array_equal(found, np.concatenate(expected))


def in_8_bits(row):
    """The row of `texts` with its embeddings in 8 bits."""
    changed = dict(row, dtype=INT8_DTYPE)
    for name, shape in (("tokens", row["tokens_shape"]), ("pooled", [1, row["pooled_size"]])):
        if row[name] is not None:
            changed[name] = encode_int8(tensor(decode_array(row[name], shape)))[0]
    return changed


class TestReader:
    @pytest.mark.parametrize("every", [1, 2])
    def test_reads_8_bits_alone_and_beside_16(self, tmp_path, every):
        reference = LatentReader(small_store(tmp_path / "half"))
        store = LatentStore(reference.version.store.uri)
        rows = reference.version.table("texts").to_pylist()
        rows = [in_8_bits(row) if i % every == 0 else row for i, row in enumerate(rows)]
        keys = pa.table({"shard": ["texts"]})
        delete_rows(store, "texts", keys)
        part = store.write_part("texts", pa.Table.from_pylist(rows, schema=TEXTS), "small")
        store.commit("texts", [part], "small")
        manifest = reference.version.manifest
        store.publish(
            describe(store, manifest.autoencoder, manifest.texts, 128, 1, manifest.statistics)
        )
        reader = LatentReader(store.open_version())
        arguments = np.arange(12), np.zeros(12, np.int64), 0
        found, expected = (one.batch(*arguments) for one in (reader, reference))
        assert found.captions == expected.captions
        assert torch.equal(found.condition.mask, expected.condition.mask)
        for name in ("tokens", "pooled"):
            small, half = (getattr(one.condition, name) for one in (found, expected))
            torch.testing.assert_close(small, half, rtol=1e-3, atol=0)
        assert reader.null_condition().tokens.abs().sum() == 0

    def test_rows_of_the_store_name_their_dtype(self):
        assert {row["dtype"] for row in text_rows("a dog")} == {ARRAY_DTYPE}
