import pytest
import torch
from small_dit import B, batch

from ldm_core.conditioning.extra import Extra
from ldm_core.conditioning.text import TextCondition, drop_captions, drop_extras
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance

SIZES = torch.arange(12.0).view(B, 3)


def captions():
    return batch()[2].with_extra("sizes", SIZES)


def test_conditions_follow_their_captions():
    cond = captions().scaled("sizes", torch.tensor([0.0, 0.25, 0.5, 1.0]))
    order = torch.tensor([2, 0])
    assert torch.equal(cond[order].extras["sizes"].value, SIZES[order])
    assert cond[order].extras["sizes"].strength.tolist() == [0.5, 0.0]
    assert torch.equal(cond[-1].extras["sizes"].value, SIZES[3:])
    assert torch.equal(cond[1].expand(3).extras["sizes"].value, SIZES[1].expand(3, 3))
    assert cond.pad_to(9).extras == cond.extras
    both = TextCondition.cat([cond, cond[:2]])
    assert both.extras["sizes"].strength.tolist() == [0.0, 0.25, 0.5, 1.0, 0.0, 0.25]


def test_what_only_some_have_is_absent_from_the_others():
    plain, hinted = batch()[2], captions().with_extra("hint", torch.ones(B, 1, 2, 2))
    for first, second in ((plain, hinted), (hinted, plain)):
        both = TextCondition.cat([first, second])
        assert set(both.extras) == {"sizes", "hint"}
        for name, extra in both.extras.items():
            here = slice(B, None) if second is hinted else slice(0, B)
            assert torch.equal(extra.value[here], hinted.extras[name].value)
            assert extra.strength[here].tolist() == [1.0] * B
            assert extra.strength.sum() == B


def test_a_cast_of_the_caption_leaves_sizes_exact():
    cond = captions().with_extra("pixels", torch.full((B, 1), 1023.0)).to(dtype=torch.bfloat16)
    assert cond.tokens.dtype == torch.bfloat16
    assert cond.extras["pixels"].value.tolist() == [[1023.0]] * B


def test_each_condition_is_dropped_by_its_own_uniforms():
    cond = captions().with_extra("hint", torch.ones(B, 1))
    u = {"sizes": torch.tensor([0.05, 0.1, 0.5, 0.0]), "hint": torch.tensor([0.9, 0.2, 0.3, 0.4])}
    dropped = drop_extras(cond, u, {"sizes": 0.1, "hint": 0.3})
    assert dropped.extras["sizes"].strength.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert dropped.extras["hint"].strength.tolist() == [1.0, 0.0, 1.0, 1.0]
    kept, gone = (drop_extras(cond, u, {"sizes": p}).extras["sizes"] for p in (0.0, 1.0))
    assert torch.equal(kept.strength, torch.ones(B))
    assert torch.equal(gone.strength, torch.zeros(B))


def test_a_dropped_caption_keeps_its_other_conditions():
    cond = captions()
    dropped = drop_captions(cond, cond[0], torch.tensor([True, False, True, False]))
    assert dropped.extras == cond.extras
    assert torch.equal(dropped.pooled[2], cond.pooled[0])


def test_strengths_multiply_and_effects_scale():
    effect = torch.randn(B, 2, 3, dtype=torch.float64)
    extra = Extra(SIZES, torch.ones(B)).scaled(0.5).scaled(torch.tensor([0.0, 1.0, 2.0, 4.0]))
    scale = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64).view(B, 1, 1)
    assert torch.equal(extra.weigh(effect), scale * effect)


def test_guidance_takes_conditions_along_and_guides_towards_what_the_null_lacks():
    def network(x_t, t, cond):  # the data is the sum of the sizes, as far as they are meant
        total = cond.extras["sizes"].weigh(cond.extras["sizes"].value).sum(dim=1, keepdim=True)
        return total.to(x_t).expand_as(x_t)

    denoiser = Denoiser(network, FlowProcess(), Prediction.X0)
    cond, x_t = captions(), torch.zeros(B, 2, dtype=torch.float64)
    given = SIZES.double().sum(dim=1, keepdim=True).expand(B, 2)
    without = ClassifierFreeGuidance(denoiser, 3.0, batch()[2][0])
    assert torch.equal(without.denoise(x_t, 0.5, cond), 3 * given)
    along = ClassifierFreeGuidance(denoiser, 3.0, drop_captions(cond, cond[0], torch.ones(B) > 0))
    assert torch.equal(along.denoise(x_t, 0.5, cond), given)


def test_mistakes_are_refused_by_name():
    with pytest.raises(ValueError, match="2 conditions 'hint' for 4 captions"):
        captions().with_extra("hint", torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"no condition 'edges', only \['sizes'\]"):
        captions().scaled("edges", 0.5)
    with pytest.raises(ValueError, match=r"strength \(4, 4\) for 4 conditions of shape \(4, 3\)"):
        captions().scaled("sizes", torch.ones(B, 1))
