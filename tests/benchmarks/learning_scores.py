"""What the weights of `bench_learning.py` draw, read back by the verifier of `ldm evaluate`."""

from collections.abc import Iterable, Iterator, Mapping

from learning_runs import CPU, Trained
from torch import Tensor, nn

from ldm_core.autoencoders.autoencoder import load_autoencoder
from ldm_core.backbones.dit import DiT
from ldm_core.backbones.mmdit import MMDiT
from ldm_core.conditioning.text import TextCondition
from ldm_core.diffusion.denoiser import Denoiser
from ldm_core.diffusion.prediction import Prediction
from ldm_core.diffusion.process import FlowProcess
from ldm_core.errors import UserError
from ldm_core.evaluation.verifier import Verdict, verify
from ldm_core.generation import PictureGenerator
from ldm_core.model_directory import ModelConfig, Reference
from ldm_core.text.encoders import load_clip, load_t5
from pipelines.backbones import new_backbone
from pipelines.evaluate_workers import Job, generate
from pipelines.recipes.schema import Recipe
from pipelines.scores import Kind, score
from pipelines.training_data import TrainingData

Counts = dict[str, tuple[int, int]]  # "single/shape" -> right, of


class AsVelocity(nn.Module):
    """A network of any prediction as one that predicts the velocity, which samplers take."""

    def __init__(self, network: DiT | MMDiT, prediction: Prediction) -> None:
        super().__init__()
        self.network, self.prediction = network, prediction

    def forward(self, x_t: Tensor, t: Tensor, cond: TextCondition) -> Tensor:
        return Denoiser(self.network, FlowProcess(), self.prediction).velocity(x_t, t, cond)


class Judge:
    """Draws captions of one object and of two, and counts what the verifier finds right."""

    def __init__(self, recipe: Recipe, data: TrainingData, counts: Mapping[Kind, int]) -> None:
        self.recipe, self.manifest = recipe, data.version.manifest
        section = recipe.evaluate
        self.job = Job(
            entries=(), teacher="", size=recipe.size, seed=section.seed,
            counts={kind: count for kind, count in counts.items() if count},
            batch_size=section.batch_size,
        )  # fmt: skip
        texts = {entry.name: entry for entry in self.manifest.texts}
        self.autoencoder = load_autoencoder(self.manifest.autoencoder.uri)
        most = self.manifest.max_tokens
        self.texts = load_t5(texts["t5"].uri, most), load_clip(texts["clip"].uri, most)
        stored = [self.manifest.autoencoder, texts["t5"], texts["clip"]]
        self.references = [Reference(uri=entry.uri, digest=entry.digest) for entry in stored]
        for mine, reference in zip((self.autoencoder, *self.texts), self.references, strict=True):
            if mine.digest != reference.digest:
                raise UserError(f"{reference.uri} is not what the store was encoded with")

    def scores(
        self, trained: Trained, prediction: Prediction, names: Iterable[str]
    ) -> dict[str, Counts]:
        """Of so named weights."""
        network, found = new_backbone(trained.config).eval(), {}
        generator = PictureGenerator(
            "", "", self._model(trained), AsVelocity(network, prediction),
            self.autoencoder, self.texts, CPU,
        )  # fmt: skip
        for name in names:
            network.load_state_dict(trained.weights[name])
            verdicts = {kind: list(self._verdicts(generator, kind)) for kind in self.job.counts}
            rows = [row for kind, each in verdicts.items() for row in score(name, kind, each)]
            found[name] = {f"{r.kind}/{r.attribute}": (r.successes, r.trials) for r in rows}
            print(f"  judged {name}", flush=True)
        return found

    def _verdicts(self, generator: PictureGenerator, kind: Kind) -> Iterator[Verdict]:
        scenes, size = self.job.scenes()[kind], self.job.batch_size
        for start in range(0, len(scenes), size):
            some = scenes[start : start + size]
            seeds = self.job.seeds(kind, start, start + len(some))
            pictures = generate(generator, some, seeds, self.recipe.train.sample_steps)
            yield from map(verify, pictures, some)

    def _model(self, trained: Trained) -> ModelConfig:
        autoencoder, t5, clip = self.references
        return ModelConfig(
            kind="teacher", backbone=trained.config, autoencoder=autoencoder, t5=t5, clip=clip,
            latents_mean=trained.statistics.mean, latents_std=trained.statistics.std,
            sizes=(f"{self.recipe.size}x{self.recipe.size}",), max_tokens=self.manifest.max_tokens,
            steps=self.recipe.train.sample_steps, guidance=self.recipe.train.guidance,
        )  # fmt: skip
