"""Which samples a reader reads and when: by one worker or many, of one store or a mixture."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from bucket_store import CLIP_OF_5, SQUARE, STATISTICS, WIDE, bucket_store, publish
from small_streams import COUNTS, TOTAL, epoch_ids, flat, ids_of, reader_of, same

from ldm_core.errors import UserError
from ldm_core.latents.compact import compact
from ldm_core.latents.manifest import LatentStatistics
from ldm_core.latents.reader import sample_key
from ldm_core.latents.store import StoreVersion
from ldm_core.reading.stream import StreamReader


@pytest.fixture(scope="module")
def version(tmp_path_factory) -> StoreVersion:
    return bucket_store(tmp_path_factory.mktemp("store") / "s", COUNTS)


@pytest.fixture(scope="module")
def reader(version) -> StreamReader:
    return reader_of(version)


class TestOrder:
    @pytest.mark.parametrize("world", [1, 2, 3, 4])
    def test_a_step_has_the_same_samples_for_any_number_of_workers(self, version, reader, world):
        ranks = [reader_of(version) for _ in range(world)]
        for step in range(15):  # more than two epochs
            alone = reader.batches(step)
            shares = [ranks[rank].batches(step, rank, world) for rank in range(world)]
            for lane, batch in enumerate(alone):
                assert same(shares[lane % world][lane // world], batch)
            assert [batch.ids.tolist() for batch in alone] == [
                [sample_key(id) for id in ids] for ids in reader.samples_at(step)
            ]

    @pytest.mark.parametrize("step", [0, 1, 7, 25])
    def test_a_restart_at_any_step_goes_on_where_it_was(self, version, reader, step):
        again = reader_of(version)
        for k in range(step, step + 5):
            assert all(map(same, again.batches(k), reader.batches(k)))

    def test_every_sample_comes_once_an_epoch(self, version, reader):
        expected = sorted(version.table("samples")["id"].to_pylist())
        for epoch in range(4):
            assert sorted(epoch_ids(reader, epoch)) == expected
        assert all(each.holds for each in reader.account(range(3)))
        assert all(each.holds for each in reader.account(range(2, 3)))

    def test_steps_are_full_and_batches_within_the_budget(self, reader):
        sizes = {SQUARE: 4, WIDE: 5, CLIP_OF_5: 2}
        small = Counter()
        for step in range(reader.order.steps(3).stop):
            batches = reader.batches(step)
            assert len(batches) == 4
            assert sum(map(len, batches)) == reader.count_at(step)
            for batch in batches:
                assert tuple(batch.latents.shape[1:]) == reader.shapes[batch.bucket]
                if len(batch) < sizes[batch.bucket]:
                    small[batch.epoch, batch.bucket] += 1
                assert len(batch) <= sizes[batch.bucket]
        assert set(small.values()) == {1}  # the last of an epoch's bucket

    def test_a_sample_beyond_the_budget_is_alone(self, version):
        reader = reader_of(version, budget=1)
        assert {len(batch) for step in range(9) for batch in reader.batches(step)} == {1}

    def test_epochs_seeds_and_lanes_have_orders_of_their_own(self, version):
        def order(**options) -> list[str]:
            reader = reader_of(version, **options)
            return [id for step in range(12) for id in flat(reader.samples_at(step))]

        told = [order(), order(seed=1), order(lanes=3), order(budget=32)]
        assert told[0] == order()
        assert all(one != other for k, one in enumerate(told) for other in told[:k])
        reader = reader_of(version)
        assert epoch_ids(reader, 0) != epoch_ids(reader, 1)
        digests = [reader_of(version, **{"seed": s}).digest for s in (0, 0, 1)]
        assert digests[0] == digests[1] != digests[2]

    def test_the_position_of_a_step(self, reader):
        batches = 16 + 6 + 4
        assert reader.order.position(0) == (0, 0.0)
        assert reader.order.position(3) == (0, 12 / batches)
        assert reader.order.position(batches) == (4, 0.0)
        assert reader.order.steps(0) == range(7)
        assert reader.order.steps(1) == range(6, 13)
        assert reader.order.samples(5) == TOTAL

    def test_files_names_do_not_matter(self, version, tmp_path):
        again = reader_of(bucket_store(tmp_path, COUNTS, texts_of=999))  # written anew
        first = reader_of(version)
        paths = [reader.indexes[0].samples.groups.paths.tolist() for reader in (first, again)]
        assert not set(paths[0]) & set(paths[1])
        assert again.digest == first.digest
        assert [again.samples_at(s) for s in range(9)] == [first.samples_at(s) for s in range(9)]

    def test_row_groups_of_several_buckets(self, tmp_path):
        store = bucket_store(tmp_path, COUNTS).store
        compact(store, "samples", 2**20)
        compact(store, "texts", 2**20)
        reader = reader_of(publish(store), window_bytes=10**9)
        assert sorted(epoch_ids(reader, 1)) == sorted(ids_of(store.uri))
        assert all(each.holds for each in reader.account(range(2)))


class TestShuffle:
    def order(self, version: StoreVersion, window_bytes: int, lanes: int = 1) -> np.ndarray:
        """Places in the files of the samples in the order of an epoch."""
        reader = reader_of(version, window_bytes=window_bytes, lanes=lanes)
        ids = [id for step in reader.order.steps(0) for id in flat(reader.samples_at(step))]
        return np.array([int(id[-4:]) for id in ids[:480]])

    @pytest.fixture(scope="class")
    def long(self, tmp_path_factory) -> StoreVersion:
        return bucket_store(tmp_path_factory.mktemp("long"), {SQUARE: 480})

    @pytest.mark.parametrize(("window", "lanes"), [(10**9, 1), (20000, 1), (10000, 4)])
    def test_neighbours_in_a_file_are_rarely_neighbours_in_the_order(self, long, window, lanes):
        order = self.order(long, window, lanes)
        assert sorted(order.tolist()) == list(range(480))
        reader = reader_of(long, window_bytes=window, lanes=lanes)
        mean = 480 / lanes / len(reader.order.windows(0, SQUARE, 0))  # samples of a window
        assert (np.abs(np.diff(order)) == 1).mean() < 4 / mean  # 2 / mean, if it is random

    def test_places_do_not_follow_the_files(self, long):
        order = self.order(long, 8000)
        assert abs(np.corrcoef(np.arange(480), order)[0, 1]) < 0.2  # 4.4 standard errors


class TestMixtures:
    @pytest.fixture(scope="class")
    def both(self, tmp_path_factory) -> tuple[StoreVersion, StoreVersion]:
        root = tmp_path_factory.mktemp("both")
        other = LatentStatistics(mean=(0.75, 0.5), std=(1.0, 1.0))
        one = bucket_store(root / "one", {SQUARE: 40, WIDE: 12}, prefix="one/")
        two = bucket_store(
            root / "two", {SQUARE: 24, CLIP_OF_5: 5}, prefix="two/", statistics=other
        )
        return one, two

    @pytest.mark.parametrize("weights", [(1, 2), (2, 0.5), (Fraction(1, 3), 1)])
    def test_each_store_is_gone_through_as_often_as_its_weight_says(self, both, weights):
        reader = reader_of(*both, weights=weights)
        counts: Counter[str] = Counter()
        for epoch in range(6):
            counts.update(epoch_ids(reader, epoch))
            assert all(each.holds for each in reader.account(range(epoch, epoch + 1)))
        assert all(each.holds for each in reader.account(range(6)))
        for prefix, weight in zip(("one/", "two/"), weights, strict=True):
            seen = {count for id, count in counts.items() if id.startswith(prefix)}
            assert seen == {6 * weight}  # whole passes, all of them

    def test_workers_and_restarts_do_not_matter_either(self, both):
        reader, again = (reader_of(*both, weights=(2, 0.5)) for _ in range(2))
        for step in (0, 13, 40):
            pair = [again.batches(step, rank, 2) for rank in range(2)]
            for lane, batch in enumerate(reader.batches(step)):
                assert same(pair[lane % 2][lane // 2], batch)

    def test_the_latents_are_normalised_by_the_statistics_of_the_mixture(self, both):
        reader = reader_of(*both, weights=(1, 2))
        shares = np.array([52, 58]) / 110
        means = np.array([STATISTICS.mean, (0.75, 0.5)])
        second = np.array([np.square(STATISTICS.std), (1.0, 1.0)]) + means**2
        mean = shares @ means
        np.testing.assert_allclose(reader.statistics.mean, mean)
        np.testing.assert_allclose(reader.statistics.std, np.sqrt(shares @ second - mean**2))
        assert reader_of(*both, statistics=STATISTICS).statistics == STATISTICS
        assert reader_of(both[0]).statistics == STATISTICS

    def test_the_account_notices_what_is_missing(self, both):
        (one, _) = reader_of(*both).account(range(1))
        one.seen[3] = 0
        assert not one.holds
        one.seen[4] = 2
        assert not one.holds


class TestRefusals:
    def refused(self, match: str, make: Callable[[], object]) -> None:
        with pytest.raises(UserError, match=match):
            make()

    def test_settings_out_of_range(self, version):
        for match, options in {
            "0 lanes": {"lanes": 0},
            "budget of 0": {"budget": 0},
            "window_bytes": {"window_bytes": 0},
            "weights": {"weights": [0]},
            "tokens": {"tokens": lambda _: 0},
        }.items():
            self.refused(match, lambda options=options: reader_of(version, **options))

    def test_more_workers_than_lanes(self, reader):
        self.refused("worker 0 of 5 at 4 lanes", lambda: reader.batches(0, 0, 5))

    def test_stores_of_other_encoders(self, version, tmp_path):
        other = bucket_store(tmp_path, {SQUARE: 3})
        entry = other.manifest.autoencoder.model_copy(update={"digest": "another"})
        texts = (
            other.manifest.texts[0].model_copy(update={"digest": "x"}),
            other.manifest.texts[1],
        )
        for match, update in {
            "autoencoder, identity and another": {"autoencoder": entry},
            "text encoders": {"texts": texts},
        }.items():
            number = other.store.publish(other.manifest.model_copy(update=update))
            wrong = other.store.open_version(number)
            self.refused(match, lambda wrong=wrong: reader_of(version, wrong, weights=(1, 1)))

    def test_a_store_named_twice_and_none(self, version):
        self.refused("twice", lambda: reader_of(version, version))
        self.refused("no store", reader_of)
