import pytest
import torch

from ldm_core.conditioning.text import TextCondition, drop_captions


def make(batch, length):
    return TextCondition(
        torch.randn(batch, length, 6), torch.ones(batch, length, dtype=bool), torch.randn(batch, 3)
    )


def test_cat_pads_to_the_longest_and_slices_back():
    a, b = make(2, 3), make(3, 5)
    both = TextCondition.cat([a, b])
    assert len(both) == 5
    assert both.tokens.shape == (5, 5, 6)
    assert both.mask.sum(dim=1).tolist() == [3, 3, 5, 5, 5]
    assert (both.tokens[~both.mask] == 0).all()
    assert torch.equal(both[:2].tokens[:, :3], a.tokens)
    assert torch.equal(both[2:].tokens, b.tokens)
    assert torch.equal(both.pooled, torch.cat([a.pooled, b.pooled]))


def test_indexing_keeps_a_batch():
    cond = make(4, 3)
    assert torch.equal(cond[-1].tokens, cond.tokens[3:])
    assert torch.equal(cond[torch.tensor([2, 0])].pooled, cond.pooled[[2, 0]])
    with pytest.raises(IndexError):
        cond[4]


def test_iterating_gives_single_captions():
    assert [len(single) for single in make(3, 2)] == [1, 1, 1]


def test_to_casts_the_embeddings_only():
    cond = make(2, 3).to(dtype=torch.bfloat16)
    assert (cond.tokens.dtype, cond.pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    assert cond.mask.dtype == torch.bool


def test_expand_one_caption():
    null = make(1, 2)
    assert torch.equal(null.expand(3).tokens[2], null.tokens[0])
    with pytest.raises(RuntimeError):
        make(2, 2).expand(3)


def test_padding_never_cuts():
    with pytest.raises(AssertionError):
        make(1, 5).pad_to(4)


def test_dropped_captions_are_the_empty_one_and_the_others_stay():
    cond, null = make(4, 3), make(1, 2)
    cond.mask[1, 2] = False
    dropped = drop_captions(cond, null, torch.tensor([True, False, False, True]))
    for row in (1, 2):
        for name in ("tokens", "mask", "pooled"):
            assert torch.equal(getattr(dropped[row], name), getattr(cond[row], name))
    for row in (0, 3):
        assert torch.equal(dropped[row].tokens, null.pad_to(3).tokens)
        assert dropped[row].mask.tolist() == [[True, True, False]]
        assert torch.equal(dropped[row].pooled, null.pooled)
    assert drop_captions(cond, null, torch.zeros(4, dtype=bool)) is cond
