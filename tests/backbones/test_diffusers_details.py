"""What families tell their models beside the latent, tables of their own, and kinds of weights."""

import pytest
import tiny_diffusers as tiny
import torch
from torch import nn

from ldm_core.backbones.diffusers_adapter import DiffusersNetwork, load_diffusers
from ldm_core.backbones.diffusers_families import call_pixart, call_unet
from ldm_core.backbones.diffusers_tables import table_of
from ldm_core.diffusion.variance_preserving import linear_betas
from ldm_core.errors import UserError

T = torch.tensor([0.3, 0.8])
OBLONG = torch.randn(2, 4, 8, 12)


class Heard(nn.Module):
    """Keeps what a model is told."""

    use_additional_conditions = True

    class config:
        addition_embed_type = "text_time"

    def forward(self, x, *args, **named):
        self.named = named
        return (x,)


def test_pixart_is_told_height_and_width_and_their_ratio():
    """Height before width, and height over width, as its pipeline has it."""
    model = Heard()
    call_pixart(model, OBLONG, T, tiny.captions())
    known = model.named["added_cond_kwargs"]
    assert known["resolution"].tolist() == [[64.0, 96.0]] * 2
    assert known["aspect_ratio"].tolist() == [[pytest.approx(64 / 96)]] * 2
    model.use_additional_conditions = False
    call_pixart(model, OBLONG, T, tiny.captions())
    assert model.named["added_cond_kwargs"] is None


def test_xl_is_told_sizes_in_the_pipelines_order():
    """Original height and width, the corner, target height and width."""
    model = Heard()
    call_unet(model, OBLONG, T, tiny.captions())
    assert model.named["added_cond_kwargs"]["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2


def test_a_table_of_trained_betas_is_taken_as_it_is():
    betas = [0.01, 0.03, 0.2]
    table = table_of({"trained_betas": betas, "beta_schedule": "linear"}, linear_betas())
    rows = table.time_of_step(torch.arange(3, dtype=torch.float64))
    expected = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(table.alpha(rows).square(), expected, rtol=1e-12, atol=0)


def test_parts_that_are_to_stay_in_float32_do(tmp_path):
    tiny.wan().save_pretrained(tmp_path)
    kept = set(type(tiny.wan())._keep_in_fp32_modules)
    network = load_diffusers(str(tmp_path), torch.bfloat16)
    for name, parameter in network.model.named_parameters():
        exact = not kept.isdisjoint(name.split("."))
        assert parameter.dtype == (torch.float32 if exact else torch.bfloat16), name
    dtypes = {parameter.dtype for parameter in network.model.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}


def test_a_condition_of_the_other_kind_is_refused():
    x = tiny.latents("dit")
    with pytest.raises(UserError, match="SD3Transformer2DModel takes captions, got a Tensor"):
        DiffusersNetwork(tiny.sd3())(x, T, torch.tensor([1, 2]))
    with pytest.raises(UserError, match="DiTTransformer2DModel takes labels .* got a TextCond"):
        DiffusersNetwork(tiny.dit())(x, T, tiny.captions())
    assert DiffusersNetwork(tiny.dit()).takes_labels
    assert not DiffusersNetwork(tiny.sd3()).takes_labels
