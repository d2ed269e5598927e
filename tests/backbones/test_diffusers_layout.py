"""Networks here written as diffusers' are those that were read, bit for bit."""

import pytest
import tiny_diffusers as tiny
import torch

from ldm_core.backbones.diffusers_layout import to_diffusers
from ldm_core.backbones.diffusers_weights import mmdit_from_flux, mmdit_from_sd3
from ldm_core.backbones.mmdit import MMDiT, MMDiTConfig
from ldm_core.errors import UserError

UNREAD = (".1.attn.add_q_proj.", ".1.attn.norm_added_q.")  # of the last block: nobody reads them


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_sd3_there_and_back(qk_norm):
    theirs = tiny.sd3(qk_norm=qk_norm, num_layers=2)
    ours = mmdit_from_sd3(theirs)
    check(theirs, to_diffusers(ours.config, ours.state_dict()), UNREAD)


@pytest.mark.parametrize(("joint", "single"), [(1, 1), (2, 3)])
def test_flux_there_and_back(joint, single):
    theirs = tiny.flux(num_layers=joint, num_single_layers=single)
    ours = mmdit_from_flux(theirs)
    check(theirs, to_diffusers(ours.config, ours.state_dict()), ())


def check(theirs, again, but: tuple[str, ...]) -> None:
    assert type(again) is type(theirs)
    expected, found = theirs.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert [name for name in different if not any(part in name for part in but)] == []
    for name in theirs.config.keys() - {"_use_default_values", "_name_or_path"}:
        assert again.config[name] == theirs.config[name], name


def fresh(**changes) -> MMDiT:
    config = {
        "in_channels": 4, "patch_size": 2, "width": 16, "depth": 2, "heads": 2,
        "text_width": tiny.TEXT, "pooled_width": tiny.POOLED, "position_grid": 12,
        "position_span": 4,
    }  # fmt: skip
    return tiny.shaken(MMDiT(MMDiTConfig(**config | changes)))


@torch.no_grad()
@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": False}, {"rotary": (2, 2, 4), "single_depth": 2}]
)
def test_one_of_our_own_predicts_the_same_there(changes):
    ours = fresh(**changes)
    model = to_diffusers(ours.config, ours.state_dict())
    back = mmdit_from_flux(model) if "rotary" in changes else mmdit_from_sd3(model)
    unread = {"position_grid", "position_span"} if "rotary" in changes else set()
    assert back.config.model_dump(exclude=unread) == ours.config.model_dump(exclude=unread)
    x, t, cond = tiny.latents("sd3"), torch.tensor([0.25, 0.9]), tiny.captions()
    assert torch.equal(back(x, t, cond), ours(x, t, cond))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"single_depth": 1}, "single_depth is 1, and diffusers' Stable Diffusion 3 has 0"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 2.0"),
        ({"rotary": (2, 2, 4)}, "no single blocks is no model of diffusers"),
        ({"rotary": (2, 2, 4), "single_depth": 1, "rotary_base": 256.0}, "Flux has 10000.0"),
        ({"rotary": (2, 2, 4), "single_depth": 1, "patch_size": 1}, "patch_size is 1"),
    ],
)
def test_what_diffusers_lacks_is_refused(changes, words):
    ours = fresh(**changes)
    with pytest.raises(UserError, match=words):
        to_diffusers(ours.config, ours.state_dict())
