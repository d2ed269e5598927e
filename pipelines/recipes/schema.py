"""What a run is: one frozen, validated object that names everything from the data to the endpoint.

A recipe is a Python function that returns a `Recipe` (see `pipelines/recipes/`). Each stage reads
its own section and the URIs of the products before it; `--set section.field=value` overrides.
"""

from typing import Literal

from pydantic import Field, model_validator

from ldm_core.errors import UserError
from ldm_core.files import absolute
from ldm_core.text.uris import placed
from pipelines.recipes.sections import (
    AutoencoderSection,
    DistillSection,
    EncodeSection,
    EvaluateSection,
    Section,
    ServeSection,
    TextSection,
    TrainSection,
)


def check_size(size: int, downsampling: int) -> None:
    """Every latent stands for a whole square of pixels."""
    if size % downsampling:
        raise UserError(
            f"size {size} is no multiple of the autoencoder's downsampling {downsampling}: try "
            f"--set size={max(1, size // downsampling) * downsampling}"
        )


class Recipe(Section):
    """A whole project: where the data lies, where the products go, and every stage's settings.

    Attributes:
        data: folder or `s3://` prefix of captioned pictures.
        root: folder or `s3://` prefix of all products; each stage's place follows from it.
        size: side of the square training pictures, pixels.
        tracking_uri: of MLflow; None takes MLFLOW_TRACKING_URI, else sqlite beside the products.
        model_name: name in the MLflow registry.
    """

    name: str
    data: str
    root: str
    seed: int = 0
    size: int = Field(64, ge=8)
    experiment: str = "latent-diffusion"
    tracking_uri: str | None = None
    model_name: str = "shapes"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    autoencoder: AutoencoderSection = AutoencoderSection()
    text: TextSection = TextSection()
    encode: EncodeSection = EncodeSection()
    train: TrainSection = TrainSection()
    distill: DistillSection = DistillSection()
    evaluate: EvaluateSection = EvaluateSection()
    serve: ServeSection = ServeSection()

    @model_validator(mode="after")
    def _whole_latents(self) -> "Recipe":
        if self.autoencoder.source == "train":  # another's downsampling is known once it is loaded
            check_size(self.size, self.autoencoder.downsampling)
        return self

    def product(self, name: str) -> str:
        """URI of a stage's product, e.g. `product("latents")`."""
        return f"{self.root.rstrip('/')}/{name}"

    def located(self) -> "Recipe":
        """The same with local paths made absolute: workers run in folders of their own."""

        def place(value: str) -> str:
            known = value in ("train", "identity", "tiny") or value.startswith("models:/")
            return value if known else absolute(value)

        text = {"t5": placed(self.text.t5, place), "clip": placed(self.text.clip, place)}
        source = {"source": place(self.autoencoder.source)}
        train = {
            "initial": self.train.initial and place(self.train.initial),
            "mix": tuple(
                share.model_copy(update={"uri": place(share.uri)}) for share in self.train.mix
            ),
        }
        return self.model_copy(
            update={
                "data": place(self.data),
                "root": place(self.root),
                "autoencoder": self.autoencoder.model_copy(update=source),
                "text": self.text.model_copy(update=text),
                "train": self.train.model_copy(update=train),
            }
        )

    @property
    def autoencoder_uri(self) -> str:
        """Where the autoencoder is, or "identity"."""
        trained = self.autoencoder.source == "train"
        return self.product("autoencoder") if trained else self.autoencoder.source

    @property
    def t5_uri(self) -> str:
        """Where the T5 encoder is."""
        return self.product("text/t5") if self.text.t5 == "tiny" else self.text.t5

    @property
    def clip_uri(self) -> str:
        """Where the CLIP text model is."""
        return self.product("text/clip") if self.text.clip == "tiny" else self.text.clip
