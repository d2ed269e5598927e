from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import small_store

from ldm_core.errors import UserError
from ldm_core.latents.reader import LatentReader, SamplePlan, sample_key
from ldm_core.latents.schema import decode_array
from ldm_core.latents.store import LatentStore

EPOCH_0 = np.zeros(12, dtype=np.int64)
ALL = np.arange(12)


def everything(plan: SamplePlan, steps: range, world: int = 1) -> list[tuple[int, int]]:
    """(row, epoch) of these steps, the workers' shares put back in order."""
    pairs = []
    for step in steps:
        shares = [list(zip(*plan.rows_at(step, rank, world), strict=True)) for rank in range(world)]
        pairs += [shares[i % world][i // world] for i in range(plan.batch_size)]
    return [(int(row), int(epoch)) for row, epoch in pairs]


class TestPlan:
    @pytest.mark.parametrize("batch_size", [1, 4, 7, 13, 40])
    def test_each_epoch_takes_every_sample_once(self, batch_size):
        plan = SamplePlan(seed=3, count=13, batch_size=batch_size)
        steps = range(-(-13 * 5 // batch_size))
        pairs = everything(plan, steps)
        assert [epoch for _, epoch in pairs] == [i // 13 for i in range(len(pairs))]
        for epoch in range(5):
            rows = [row for row, e in pairs if e == epoch]
            assert sorted(rows) == list(range(13))

    @pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
    def test_the_batch_does_not_know_how_many_workers_share_it(self, world):
        plan = SamplePlan(seed=0, count=17, batch_size=12)
        assert everything(plan, range(6), world) == everything(plan, range(6))

    def test_a_step_needs_no_history(self):
        plan, other = (SamplePlan(seed=5, count=50, batch_size=8) for _ in range(2))
        for step in range(40):
            plan.rows_at(step)
        np.testing.assert_array_equal(plan.rows_at(31), other.rows_at(31))

    def test_epochs_and_seeds_differ(self):
        def rows(seed: int, step: int) -> list[int]:
            return SamplePlan(seed=seed, count=100, batch_size=100).rows_at(step)[0].tolist()

        assert rows(0, 0) != rows(0, 1)
        assert rows(0, 0) != rows(1, 0)

    def test_an_empty_plan_is_refused(self):
        with pytest.raises(UserError, match="over 0 samples in batches of 4"):
            SamplePlan(seed=0, count=0, batch_size=4)


class TestLatents:
    @pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 3, 3), (2, 5, 3, 3)])
    def test_without_spread_they_are_the_stored_means_normalised(self, tmp_path, shape):
        """Of pictures, and of clips with as many frames as channels and with more."""
        version = small_store(tmp_path, shape=shape)
        reader = LatentReader(version)
        batch = reader.batch(ALL, EPOCH_0, seed=0)
        stored = {
            row["id"]: decode_array(row["latent_mean"], row["latent_shape"])
            for row in version.table("samples").to_pylist()
        }
        raw = batch.latents * reader.std + reader.mean
        for id, latent in zip(reader.ids, raw, strict=True):
            np.testing.assert_allclose(latent, stored[id].astype(np.float32), atol=1e-6)
        assert batch.latents.dtype == torch.float32
        channels = batch.latents.transpose(0, 1).flatten(1)
        assert channels.mean(1).abs().max() < 1e-5
        assert (channels.std(1, correction=0) - 1).abs().max() < 1e-5

    def test_rows_follow_the_sorted_ids_whatever_the_parts(self, tmp_path):
        one, many = (
            LatentReader(small_store(tmp_path / str(parts), parts=parts)) for parts in (1, 5)
        )
        assert one.ids == many.ids == sorted(one.ids)
        assert torch.equal(one.batch(ALL, EPOCH_0, 0).latents, many.batch(ALL, EPOCH_0, 0).latents)
        assert one.version.manifest.content == many.version.manifest.content

    def test_the_draw_has_the_posteriors_moments(self, tmp_path):
        reader = LatentReader(small_store(tmp_path, logvar=float(np.log(0.25))))
        rows, epochs = np.full(300, 3), np.arange(300)
        raw = reader.batch(rows, epochs, seed=1).latents * reader.std + reader.mean
        stored = reader.version.table("samples").sort_by("id")["latent_mean"][3].as_py()
        mean = torch.from_numpy(decode_array(stored, reader.shape).astype(np.float32))
        eps = (raw - mean) / 0.5  # 300 x 18 standard normal numbers
        assert eps.mean().abs() < 5 / eps.numel() ** 0.5
        assert (eps.std() - 1).abs() < 5 / (2 * eps.numel()) ** 0.5

    def test_a_draw_belongs_to_seed_epoch_and_sample(self, tmp_path):
        reader = LatentReader(small_store(tmp_path, logvar=0.0))
        batch = reader.batch(ALL, EPOCH_0, seed=0).latents
        alone = reader.batch(np.array([9, 4]), np.array([0, 0]), seed=0).latents
        assert torch.equal(alone, batch[[9, 4]])
        mixed = reader.batch(np.array([9, 9]), np.array([0, 1]), seed=0).latents
        assert torch.equal(mixed[0], batch[9])
        assert not torch.equal(mixed[1], batch[9])
        assert not torch.equal(reader.batch(ALL, EPOCH_0, seed=1).latents, batch)

    def test_keys_are_stable_and_distinct(self, tmp_path):
        reader = LatentReader(small_store(tmp_path))
        batch = reader.batch(np.array([2]), np.array([0]), 0)
        assert batch.ids.tolist() == [sample_key("002.png")]
        # `printf 002.png | sha256sum` begins with 2eaf77187b65b7e8
        assert sample_key("002.png") == 8384491658451605399
        assert len(set(reader.keys.tolist())) == 12

    def test_two_buckets_are_refused(self, tmp_path):
        version = small_store(tmp_path)
        manifest = version.manifest.model_copy(update={"buckets": {"3x3x1": 6, "4x4x1": 6}})
        number = version.store.publish(manifest)
        with pytest.raises(UserError, match="4x4x1"):
            LatentReader(version.store.open_version(number))


class TestCaptions:
    def test_embeddings_are_those_of_the_chosen_caption_and_padded_in_the_batch_only(
        self, tmp_path
    ):
        reader = LatentReader(small_store(tmp_path))
        batch = reader.batch(ALL, EPOCH_0, seed=0)
        condition = batch.condition
        assert condition.tokens.shape == (12, condition.mask.sum(1).max(), reader.token_width)
        for i, caption in enumerate(batch.captions):
            words = len(caption.split())
            assert condition.mask[i].tolist() == [True] * (words + 1) + [False] * (
                condition.mask.shape[1] - words - 1
            )
            assert (condition.tokens[i][condition.mask[i]] == words).all()
            assert (condition.tokens[i][~condition.mask[i]] == 0).all()
            assert condition.pooled[i].tolist() == [len(caption)] * reader.pooled_width

    def test_the_choice_follows_the_weights_and_the_sample(self, tmp_path):
        reader = LatentReader(small_store(tmp_path))  # odd rows have two captions
        epochs = np.arange(400)
        picks = reader.batch(np.full(400, 1), epochs, seed=0).captions
        assert abs(picks.count("cat") / 400 - 0.5) < 5 * 0.5 / 400**0.5
        assert set(picks) == {"cat", "a red cat"}
        assert reader.batch(np.array([1]), epochs[7:8], seed=0).captions == [picks[7]]
        assert set(reader.batch(np.full(50, 0), epochs[:50], seed=0).captions) == {"a dog"}

    def test_the_null_condition_is_the_empty_caption(self, tmp_path):
        null = LatentReader(small_store(tmp_path)).null_condition()
        assert (len(null), null.mask.tolist()) == (1, [[True]])
        assert null.tokens.abs().sum() == null.pooled.abs().sum() == 0

    def test_a_version_opened_by_path_is_enough(self, tmp_path: Path):
        small_store(tmp_path)
        assert len(LatentReader(LatentStore(str(tmp_path)).open_version())) == 12
