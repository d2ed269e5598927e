"""What a reader makes of the rows: latents drawn and normalised, with their captions."""

import numpy as np
import pytest
import torch
from bucket_store import CLIP_OF_5, SQUARE, STATISTICS, WIDE, bucket_store
from small_streams import COUNTS, reader_of, same
from store_texts import in_eight_bits

from ldm_core.errors import UserError
from ldm_core.latents.reader import LatentReader, sample_key
from ldm_core.latents.schema import decode_array
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.stream import StreamReader


@pytest.fixture(scope="module")
def version(tmp_path_factory) -> StoreVersion:
    return bucket_store(tmp_path_factory.mktemp("store") / "s", COUNTS)


@pytest.fixture(scope="module")
def reader(version) -> StreamReader:
    return reader_of(version)


class TestValues:
    """Against the reader that holds a whole store, which is proved by itself."""

    @pytest.fixture(scope="class")
    def square(self, tmp_path_factory) -> StoreVersion:
        return bucket_store(tmp_path_factory.mktemp("square"), {SQUARE: 50})

    @pytest.mark.parametrize("epoch", [0, 3])
    def test_a_sample_is_what_the_whole_store_reader_makes_of_it(self, square, epoch):
        stream, whole = reader_of(square, seed=5), LatentReader(square)
        place = {int(key): k for k, key in enumerate(whole.keys)}
        for step in stream.order.steps(epoch):
            for batch in stream.batches(step, epoch=epoch):
                rows = np.array([place[key] for key in batch.ids.tolist()])
                other = whole.batch(rows, np.full(len(rows), epoch), seed=5)
                assert torch.equal(batch.latents, other.latents)
                assert batch.captions == other.captions
                for name in ("tokens", "mask", "pooled"):
                    one, two = (getattr(each.condition, name) for each in (batch, other))
                    assert torch.equal(one, two)

    def test_the_second_pass_of_an_epoch_has_draws_of_its_own(self, square):
        twice, once = reader_of(square, weights=[2]), reader_of(square)

        def latents(reader: StreamReader, epoch: int) -> dict[int, set[bytes]]:
            found: dict[int, set[bytes]] = {}
            for step in reader.order.steps(epoch):
                for batch in reader.batches(step, epoch=epoch):
                    for key, latent in zip(batch.ids.tolist(), batch.latents, strict=True):
                        found.setdefault(key, set()).add(latent.numpy().tobytes())
            return found

        both, first, second = latents(twice, 0), latents(once, 0), latents(once, 1)
        for key, seen in both.items():
            assert seen == first[key] | second[key]
            assert len(seen) == 2

    def test_without_spread_they_are_the_stored_means_normalised(self, tmp_path):
        version = bucket_store(tmp_path, COUNTS, logvar=-60.0)
        reader = reader_of(version)
        stored = {
            sample_key(row["id"]): decode_array(row["latent_mean"], row["latent_shape"])
            for row in version.table("samples").to_pylist()
        }
        for step in range(12):
            for batch in reader.batches(step):
                channel = (1, -1) + (1,) * (batch.latents.ndim - 2)
                mean = torch.tensor(STATISTICS.mean).view(channel)
                std = torch.tensor(STATISTICS.std).view(channel)
                raw = np.stack([stored[key] for key in batch.ids.tolist()]).astype(np.float32)
                assert torch.equal(batch.latents, (torch.from_numpy(raw) - mean) / std)

    def test_a_clip_draws_as_a_picture_does(self, reader):
        for step in reader.order.steps(0):
            for batch in reader.batches(step):
                if batch.bucket == CLIP_OF_5:
                    assert batch.latents.shape[1:] == (2, 2, 4, 4)
                    assert abs(batch.latents).max() < 20

    def test_the_null_condition_and_the_widths(self, reader):
        null = reader.null_condition()
        assert (len(null), null.mask.tolist()) == (1, [[True]])
        assert null.tokens.abs().sum() == null.pooled.abs().sum() == 0
        assert (reader.token_width, reader.pooled_width) == (5, 3)

    def test_first_is_always_the_same(self, version):
        one, other = reader_of(version).first(4), reader_of(version, lanes=2, budget=32).first(4)
        assert same(one, other)
        assert (len(one), one.bucket) == (4, SQUARE)  # that of most samples
        assert len(reader_of(version).first(1000)) == 8
        assert one.latents.shape == (4, 2, 4, 4)

    def test_first_of_a_bucket(self, version, tmp_path):
        more = bucket_store(tmp_path, {"8x8x1": 3}, prefix="more/", shapes={"8x8x1": (2, 8, 8)})
        with reader_of(version, more) as reader:
            found = {name: reader.first(2, name) for name in (WIDE, CLIP_OF_5, "8x8x1")}
            assert {name: batch.bucket for name, batch in found.items()} == {n: n for n in found}
            assert found["8x8x1"].latents.shape == (2, 2, 8, 8)
            with pytest.raises(UserError, match="no store has the bucket 1x1x1: choose one of"):
                reader.first(2, "1x1x1")

    def test_texts_in_eight_bits(self, tmp_path):
        version = in_eight_bits(bucket_store(tmp_path, {SQUARE: 30}, texts_of=3))
        stream, whole = reader_of(version), LatentReader(version)
        place = {int(key): k for k, key in enumerate(whole.keys)}
        for batch in stream.batches(2):
            rows = np.array([place[key] for key in batch.ids.tolist()])
            other = whole.batch(rows, np.full(len(rows), batch.epoch), seed=0)
            assert torch.equal(batch.condition.tokens, other.condition.tokens)
