"""Every family: loaded, trained, sampled and saved; and the same pictures as its own pipeline."""

import inspect

import pytest
import tiny_diffusers as tiny
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    Lumina2Pipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)

from ldm_core.backbones.diffusers_adapter import DiffusersNetwork, load_diffusers
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.grids import linear_grid, table_grid
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess, add_noise
from ldm_core.diffusion.variance_preserving import DiscreteVP
from ldm_core.objectives.regression import mean_square
from ldm_core.samplers.euler import sample_euler

EVERY = pytest.mark.parametrize("name", tiny.FAMILIES)
T = torch.tensor([0.3, 0.8])


def grid_of(network, steps):
    flow = isinstance(network.process, FlowProcess)
    return linear_grid(steps) if flow else table_grid(network.process, steps).float()


@EVERY
def test_a_saved_model_is_loaded_trained_sampled_and_saved_again(name, tmp_path):
    tiny.FAMILIES[name]().save_pretrained(tmp_path / "first")
    network = load_diffusers(str(tmp_path / "first"))
    x0, cond = tiny.latents(name), tiny.condition(name)

    losses = [train_step(network, x0, cond) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]

    with torch.no_grad():
        x = sample_euler(network.denoiser(), torch.randn_like(x0), grid_of(network, 3), cond)
    assert x.shape == x0.shape
    assert x.isfinite().all()

    network.save(tmp_path / "second")
    with torch.no_grad():
        model = by_diffusers(tmp_path / "second", type(network.model))
        assert torch.equal(DiffusersNetwork(model)(x0, T, cond), network(x0, T, cond))
    assert sorted(f.name for f in (tmp_path / "second").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def by_diffusers(folder, kind):
    """Loaded back by diffusers itself; a class of its with float32 parts would need accelerate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_keep_in_fp32_modules", None)
        return kind.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)


def train_step(network, x0, cond):
    """A small step down the gradient, which must be a number in every weight and zero in few."""
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    x_t = add_noise(network.process, x0, eps, T)
    network.zero_grad()
    loss = mean_square(network(x_t, T, cond), eps).mean()
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    unused = {name for name, g in gradients.items() if g is None or not g.abs().max() > 0}
    assert unused <= UNUSED
    assert all(g.isfinite().all() for g in gradients.values() if g is not None)
    norm = torch.stack([g.square().sum() for g in gradients.values() if g is not None]).sum().sqrt()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 / norm * parameter.grad
    return loss.item()


# the last block of SD3 makes queries of the text and throws their answers away
UNUSED = {f"model.transformer_blocks.1.attn.add_q_proj.{kind}" for kind in ("weight", "bias")}


@EVERY
def test_another_number_of_channels_is_refused_by_both_numbers(name):
    network = DiffusersNetwork(tiny.FAMILIES[name]())
    x = tiny.latents(name).repeat_interleave(4, dim=1)
    with pytest.raises(ValueError, match=r"latents of 16 channels .* of 4:"):
        network(x, T, tiny.condition(name))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(tiny.FAMILIES.keys() - {"dit", "sd3"}))
def test_padding_changes_nothing(name):
    network, x = DiffusersNetwork(tiny.FAMILIES[name]()), tiny.latents(name)
    cond = tiny.condition(name, (5, 2))
    out = network(x, T, cond)
    torch.testing.assert_close(network(x, T, cond.pad_to(8)), out, rtol=0, atol=1e-5)
    short = TextCondition(cond.tokens[1:, :2], cond.mask[1:, :2], cond.pooled[1:])
    torch.testing.assert_close(network(x[1:], T[1:], short), out[1:], rtol=0, atol=1e-5)


@torch.no_grad()
@EVERY
def test_samples_are_independent_of_their_order(name):
    network, x = DiffusersNetwork(tiny.FAMILIES[name]()), tiny.latents(name)
    cond = tiny.condition(name)
    out = network(x, T, cond)
    torch.testing.assert_close(network(x.flip(0), T.flip(0), cond[[1, 0]]), out.flip(0))
    assert (network(x, T, cond[[1, 0]]) - out).abs().max() > 1e-4  # and conditions matter


def test_sd3_refuses_padding():
    network = DiffusersNetwork(tiny.sd3())
    with pytest.raises(ValueError, match=r"only 7 of 10 are captions"):
        network(tiny.latents("sd3"), T, tiny.condition("sd3", (5, 2)))


def test_wan_refuses_what_it_would_cut():
    network = DiffusersNetwork(tiny.wan(), max_tokens=4)
    with pytest.raises(ValueError, match=r"5 tokens of text .* Wan's 4"):
        network(tiny.latents("wan"), T, tiny.condition("wan"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
def test_guidance_is_told_to_models_distilled_with_it(name):
    model, x = tiny.FAMILIES[name](guidance_embeds=True), tiny.latents(name)
    low, high = (DiffusersNetwork(model, guidance=g)(x, T, tiny.captions()) for g in (1.0, 8.0))
    assert (low - high).abs().max() > 1e-4


def test_labels_are_not_dropped_by_chance():
    network = DiffusersNetwork(tiny.dit()).train()
    x, labels = tiny.latents("dit"), tiny.condition("dit")
    outs = torch.stack([network(x, T, labels) for _ in range(30)])
    assert torch.equal(outs, outs[:1].expand_as(outs))


# -- the same pictures as diffusers' own pipelines -------------------------------------------------

PIPELINES = {
    "sd3": StableDiffusion3Pipeline, "flux": FluxPipeline, "lumina2": Lumina2Pipeline,
    "wan": WanPipeline, "hunyuan_video": HunyuanVideoPipeline, "ltx": LTXPipeline,
    "pixart": PixArtAlphaPipeline, "unet": StableDiffusionPipeline,
    "unet_xl": StableDiffusionXLPipeline,
}  # fmt: skip
FLOW_STEPS = 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "lumina2", "wan", "hunyuan_video", "ltx"])
def test_a_flow_ends_where_its_pipeline_does(name):
    model, x, cond = tiny.FAMILIES[name](), tiny.latents(name), tiny.condition(name)
    packed, scheduler = x, FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "ltx":
        packed = x.flatten(2).transpose(1, 2)
    theirs = run_pipeline(name, model, packed, cond, scheduler)
    if name == "ltx":
        theirs = theirs.transpose(1, 2).reshape(x.shape)
    ours = sample_euler(DiffusersNetwork(model).denoiser(), x, scheduler.sigmas, cond)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("distilled", [False, True])
def test_flux_ends_where_its_pipeline_does(distilled):
    model, cond = tiny.flux(guidance_embeds=distilled), tiny.captions()
    x = torch.randn(2, 4, 8, 12)
    packed = FluxPipeline._pack_latents(x, 2, 4, 8, 12)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = run_pipeline("flux", model, packed, cond, scheduler, guidance_scale=7.0, width=96)
    theirs = FluxPipeline._unpack_latents(theirs, 64, 96, 8)
    network = DiffusersNetwork(model, guidance=7.0)
    ours = sample_euler(network.denoiser(), x, scheduler.sigmas, cond)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["pixart", "unet", "unet_xl"])
def test_one_step_of_a_table_is_its_pipelines(name, prediction):
    """One step of DDIM from the last row to the data returns the expected data."""
    model, x, cond = tiny.FAMILIES[name](), tiny.latents(name), tiny.condition(name)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        timestep_spacing="trailing", prediction_type=prediction,
    )  # fmt: skip
    network = DiffusersNetwork(model, scheduler.config)
    ours = network.denoiser().denoise(x, 1.0, cond)
    theirs = run_pipeline(name, model, x, cond, scheduler, num_inference_steps=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def run_pipeline(name, model, x, cond, scheduler, **more):
    """The pipeline without its encoders, given embeddings and noise, up to the latents."""
    kind = PIPELINES[name]
    parameters = inspect.signature(kind.__init__).parameters
    parts = {
        part: None for part, p in parameters.items() if part != "self" and p.default is p.empty
    }
    denoiser = "unet" if "unet" in parameters else "transformer"
    pipeline = kind(**{**parts, denoiser: model, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    tokens, mask = cond.tokens, cond.mask.long()
    if name == "wan":  # its own encoding fills captions up with zeros
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, 512 - tokens.shape[1]))
    arguments = {
        "prompt": None, "prompt_embeds": tokens, "prompt_attention_mask": mask, "latents": x,
        "pooled_prompt_embeds": cond.pooled, "height": 64, "width": 64, "guidance_scale": 1.0,
        "num_inference_steps": FLOW_STEPS, "output_type": "latent", "return_dict": False,
        "negative_prompt": None, "use_resolution_binning": False, "num_frames": 9,
    }  # fmt: skip
    if name == "ltx":
        arguments |= {"height": 256, "width": 256, "num_frames": 17}
    if name == "hunyuan_video":
        arguments["guidance_scale"] = 6.0
    arguments |= more
    taken = inspect.signature(kind.__call__).parameters
    return pipeline(**{key: value for key, value in arguments.items() if key in taken})[0]


# -- what the folder says ------------------------------------------------------------------------


def test_the_scheduler_beside_a_unet_is_read(tmp_path):
    tiny.unet().save_pretrained(tmp_path / "unet")
    plain = load_diffusers(str(tmp_path / "unet"))
    assert plain.prediction is Prediction.EPS
    DDIMScheduler(
        num_train_timesteps=20, prediction_type="v_prediction", rescale_betas_zero_snr=True
    ).save_pretrained(tmp_path / "scheduler")
    network = load_diffusers(str(tmp_path / "unet"))
    assert network.prediction is Prediction.V
    assert isinstance(network.process, DiscreteVP)
    assert network.process.steps == 20
    theirs = DDIMScheduler(num_train_timesteps=20, rescale_betas_zero_snr=True).alphas_cumprod
    t = network.process.time_of_step(torch.arange(20.0))
    torch.testing.assert_close(network.process.alpha(t).square(), theirs, rtol=0, atol=1e-5)
    assert network.process.alpha(t[-1]) < 1e-6


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_weights_may_be_loaded_in_half_precision(name, tmp_path):
    tiny.FAMILIES[name]().save_pretrained(tmp_path)
    network, whole = (load_diffusers(str(tmp_path), dtype) for dtype in (torch.bfloat16, None))
    x, cond = tiny.latents(name), tiny.captions()
    with torch.no_grad():
        out, exact = network(x, T, cond), whole(x, T, cond)
    assert network.model.proj_out.weight.dtype == torch.bfloat16
    assert whole.model.proj_out.weight.dtype == torch.float32
    assert out.dtype == torch.float32
    assert 0 < (out - exact).std() < 0.05 * exact.std()


def test_shards_are_put_together(tmp_path):
    model, x = tiny.flux(), tiny.latents("flux")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    network = load_diffusers(str(tmp_path))
    with torch.no_grad():
        expected = DiffusersNetwork(model)(x, T, tiny.captions())
        assert torch.equal(network(x, T, tiny.captions()), expected)


def test_weights_of_another_model_are_refused(tmp_path):
    tiny.wan(num_layers=2).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_layers": 2', '"num_layers": 1'))
    with pytest.raises(ValueError, match=r"0 are missing and \d+ have no place, such as blocks\.1"):
        load_diffusers(str(tmp_path))
    (tmp_path / "config.json").write_text(config.replace('"ffn_dim": 32', '"ffn_dim": 48'))
    with pytest.raises(ValueError, match=r"not those of config\.json: .*size mismatch"):
        load_diffusers(str(tmp_path))


def test_what_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json there"):
        load_diffusers(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "EvilModel"}')
    with pytest.raises(ValueError, match="holds EvilModel, not a model of diffusers"):
        load_diffusers(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "SD3Transformer2DModel"}')
    with pytest.raises(ValueError, match=r"no diffusion_pytorch_model\.safetensors, and pickled"):
        load_diffusers(str(tmp_path))
    with pytest.raises(ValueError, match="Linear is not among the models"):
        DiffusersNetwork(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="beta_schedule 'sigmoid'"):
        DiffusersNetwork(tiny.unet(), {"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="prediction_type 'flow'"):
        DiffusersNetwork(tiny.unet(), {"prediction_type": "flow"})
