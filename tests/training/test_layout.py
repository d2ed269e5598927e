import pytest

from ldm_core.errors import UserError
from ldm_core.training.layout import Layout


def test_neighbours_share_a_sample_and_others_do_not():
    layout = Layout(replicate=2, shard=3, context=2)
    assert (layout.world, layout.data_world, layout.holders) == (12, 6, 6)
    assert [layout.data_rank(rank) for rank in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_without_shards_every_worker_holds_everything():
    assert Layout(replicate=4, context=2).holders == 1


def test_copies_fill_the_workers_there_are():
    assert Layout.filling(8, shard=2, context=2) == Layout(2, 2, 2)
    with pytest.raises(UserError, match=r"6 workers .* shard 2 x context 2: start 8"):
        Layout.filling(6, shard=2, context=2)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"layout.shard is 0"):
        Layout(shard=0)
    layout = Layout(replicate=1, shard=4, context=3)
    with pytest.raises(UserError, match=r"shard 4 x context 3 is 12 workers, but there are 8"):
        layout.check(8)
    with pytest.raises(UserError, match=r"8 heads do not divide among layout.context 3"):
        layout.check(12, heads=8)
    with pytest.raises(UserError, match=r"to 12 workers, but the smallest .* has 8 rows"):
        layout.check(12, heads=9, rows=8)
    layout.check(12, heads=9, rows=12)
