"""Stage 3's settings: network, data, optimisation, and how the workers share it."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.recipes.base import Section, TrainingSection
from pipelines.recipes.layout_section import LayoutSection
from pipelines.recipes.train_deciding import deciding_values
from pipelines.recipes.train_refusals import check_together

Decay = Annotated[float, Field(ge=0, lt=1)]
BucketName = Annotated[str, Field(pattern=r"^[1-9]\d*x[1-9]\d*x[1-9]\d*$")]

SNAPSHOTS = 50  # of each average, unless the recipe says how often: all of them stay


class StoreShare(Section):
    """A further latent store to train on.

    Attributes:
        uri: where it is.
        weight: how often it is gone through while the recipe's own store is gone through once.
        version: of its published versions; None is the newest.
    """

    uri: str
    weight: float = Field(1.0, gt=0)
    version: int | None = Field(None, ge=1)


class TrainSection(TrainingSection):
    """Stage 3: the store -> a text-conditioned latent diffusion transformer.

    Attributes:
        backbone: "dit" reads a refined caption; "mmdit" gives text and image weights of their own;
            "diffusers" is the transformer of diffusers in `initial`, whatever its class, trained as
            it is: its folder says its shape, and `patch_size`, `width`, `depth`, `heads`,
            `mlp_ratio`, `text_depth`, `single_depth`, `qk_norm` and `positions` mean nothing.
        mlp_ratio: hidden width of the MLPs over `width`; None is the backbone's own.
        text_depth: of a dit: blocks that refine the caption.
        single_depth: of an mmdit: blocks over all tokens alike, after `depth` joint ones.
        qk_norm: whether queries and keys are normalised.
        positions: of an mmdit: "fixed" is for pictures alone.
        buckets: "height x width x frames" it is meant for, the main one first; without any,
            pictures of the recipe's size. A store adds its own.
        initial: that training starts from: a model directory, by whose statistics latents are then
            normalised, or the folder of a diffusers transformer, which has the stores'. A dit or
            mmdit begins with SD3 and Flux alone, which become an mmdit.
        lora_rank: of low-rank adapters on `initial`'s attention, which alone are trained, by AdamW
            whatever `optimizer` says, and in the end merged; None trains all weights.
        store_version: of the recipe's store; None is the newest.
        mix: further stores.
        batch_size: samples of an optimiser step, of the main bucket.
        micro_batches: parts of a step that are computed apart and averaged; None is one for each
            worker that is given samples of its own.
        tokens: the most of a micro-batch; None is what its samples of the main bucket have. Larger
            samples come in smaller micro-batches.
        least_workers: when machines are lost, training goes on with so many or more, and takes
            others as they come; None waits until workers.count can start again.
        activation_checkpointing: what is computed again in the backward pass: "selective" is what
            is no matrix product, "full" is every block.
        float8: whether the blocks' matrix products are computed in 8 bits.
        schedule: after the warm-up; "wsd" falls over the last `decay_fraction` of the steps.
        timestep_mean, timestep_std: of the logit-normal draw; shift moves mass to more noise.
        ema_decay: of the averaged weights that are the model.
        ema_decays: of further averages.
        ema_lengths: relative widths of power-function averages, of which snapshots are kept.
        snapshot_every: steps between these, all of which stay; None is at checkpoints, so many of
            them between two that there are 50 at most.
        spike_factor: a step whose gradient is so many times the usual is skipped; None is never.
        validation_samples: at most so many are held out, all of a file or none, for a loss at fixed
            noise every `validate_every` steps; `mix` leaves out the same files.
        patience: training ends after so many validations in a row without a lower loss, wherever
            the learning rate is then; None is never. A loss counts at the validation after it,
            and training waits for it there.
        promote: which models the registry's alias "champion" moves to: "always" to the newest, or
            when it is "better", of a lower validation loss on the very same held-out rows. Then
            every model is registered from a copy of its own, beside the product.
        validation_gpus: of the actor that validates and draws pictures beside training.
        system_metrics: whether each machine's load is told once a minute.
        keep_checkpoints: the newest so many.
        sample_steps, guidance: what the model draws with unless told otherwise, previews included.
        accelerator: what the workers have, for the plan: a layout that cannot fit is refused.
        worker_hour_price: for the cost a dry run tells; 0 is what the accelerator typically costs.
    """

    backbone: Literal["dit", "mmdit", "diffusers"] = "dit"
    patch_size: int = Field(2, ge=1)
    width: int = Field(192, ge=16)
    depth: int = Field(8, ge=1)
    heads: int = Field(6, ge=1)
    mlp_ratio: float | None = Field(None, gt=0)
    text_depth: int = Field(2, ge=0)
    single_depth: int = Field(0, ge=0)
    qk_norm: bool = True
    positions: Literal["rotary", "fixed"] = "rotary"
    buckets: tuple[BucketName, ...] = ()
    initial: str | None = None
    lora_rank: int | None = Field(None, ge=1)
    store_version: int | None = Field(None, ge=1)
    mix: tuple[StoreShare, ...] = ()
    steps: int = Field(800, ge=1)
    micro_batches: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)
    layout: LayoutSection = LayoutSection()
    least_workers: int | None = Field(None, ge=1)
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    float8: bool = False
    optimizer: Literal["muon", "adamw"] = "muon"
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    warmup_steps: int = Field(50, ge=0)
    decay_fraction: float = Field(0.3, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    spike_factor: float | None = Field(None, gt=1)
    caption_drop: float = Field(0.1, ge=0, lt=1)
    timestep_mean: float = 0.0
    timestep_std: float = Field(1.0, gt=0)
    timestep_shift: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    ema_decays: tuple[Decay, ...] = ()
    ema_lengths: tuple[Annotated[float, Field(gt=0, lt=0.288)], ...] = ()
    snapshot_every: int | None = Field(None, ge=1)
    validation_samples: int = Field(0, ge=0)
    validate_every: int = Field(400, ge=1)
    patience: int | None = Field(None, ge=1)
    promote: Literal["always", "better"] = "always"
    validation_gpus: float = Field(0, ge=0)
    system_metrics: bool = True
    keep_checkpoints: int = Field(2, ge=1)
    sample_steps: int = Field(32, ge=1)
    guidance: float = Field(2.5, ge=1)
    sample_every: int = Field(400, ge=1)
    accelerator: str | None = None
    worker_hour_price: float = Field(0.0, ge=0)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result: not who computes it, nor what is told on the way.

        Of other stores and the initial model it has the weights alone: their contents are inputs.
        A field that a former program did not have counts once it says something new.
        """
        told = deciding_values(self)
        if self.mix:
            told["mix"] = [share.weight for share in self.mix]
        if self.patience is not None:  # then these steps are where training may end
            told["validate_every"] = self.validate_every
        return told | {"parts": self.parts}  # which samples a step has

    @property
    def lanes(self) -> int:
        """Workers, or groups of `layout.context` of them, that are given samples of their own."""
        return self.layout.replicas(self.workers.count) * self.layout.shard

    @property
    def parts(self) -> int:
        """Micro-batches of a step."""
        return self.micro_batches or self.lanes

    @property
    def snapshot_steps(self) -> int:
        """Steps between two snapshots."""
        kept = math.ceil(self.steps / (SNAPSHOTS * self.checkpoint_every))
        return self.snapshot_every or kept * self.checkpoint_every

    @property
    def snapshots(self) -> int:
        """How many there are in the end, of all averages."""
        return math.ceil(self.steps / self.snapshot_steps) * len(self.ema_lengths)

    @model_validator(mode="after")
    def _shares(self) -> "TrainSection":
        """Instead of the base's, whose shares are of workers and not of micro-batches."""
        check_together(self)
        return self
