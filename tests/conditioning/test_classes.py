import pytest
import torch
from small_dit import POOLED, B, batch, trained_dit

from ldm_core.conditioning.classes import ClassEmbedding
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.guidance.classifier_free import ClassifierFreeGuidance

LABELS = torch.tensor([0, 4, 2, 4])


def embedding():
    torch.manual_seed(2)
    return ClassEmbedding(5, 10, POOLED).double()


def test_a_label_is_one_token_of_its_own():
    cond = embedding()(LABELS)
    assert cond.tokens.shape == (B, 1, 10)
    assert cond.mask.tolist() == [[True]] * B
    assert torch.equal(cond.tokens[1], cond.tokens[3])
    assert not torch.equal(cond.pooled[0], cond.pooled[2])


def test_dropped_labels_are_the_null_class_and_no_other():
    classes = embedding()
    drop = torch.tensor([True, False, False, True])
    cond, null = classes(LABELS, drop), classes.null()
    for row, expected in enumerate([null, classes(LABELS)[1], classes(LABELS)[2], null]):
        assert torch.equal(cond[row].tokens, expected.tokens)
        assert torch.equal(cond[row].pooled, expected.pooled)
    everything = classes(torch.arange(5))
    assert (everything.pooled != null.pooled).any(dim=1).all()


def test_a_dit_of_captions_takes_classes_and_guides_them():
    classes, (x_t, t, _) = embedding(), batch()
    denoiser = Denoiser(trained_dit(), FlowProcess(), Prediction.VELOCITY)
    cond, null = classes(LABELS), classes.null()
    d_c, d_u = (denoiser.denoise(x_t, t, which.expand(B)) for which in (cond, null))
    guided = ClassifierFreeGuidance(denoiser, 3.0, null).denoise(x_t, t, cond)
    torch.testing.assert_close(guided, d_u + 3 * (d_c - d_u), rtol=0, atol=1e-12)
    assert (d_c - d_u).abs().max() > 1e-3


def test_gradient_reaches_the_classes_seen_and_the_null_class():
    classes, (x_t, t, _) = embedding(), batch()
    out = trained_dit()(x_t, t, classes(LABELS, torch.tensor([True, False, False, False])))
    out.square().sum().backward()
    for table in (classes.tokens, classes.pooled):
        moved = table.weight.grad.abs().amax(dim=1) > 0
        assert moved.tolist() == [False, False, True, False, True, True]


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_is_refused(label):
    with pytest.raises(ValueError, match=f"label {label} of 5 classes"):
        embedding()(torch.tensor([0, label]))
