"""How much of the encode job is the encoders' own work, against which loop, in how many bytes.

    make bench-encode [ARGS="--pictures 512 --precision bf16 --predict"]

The same pictures (256 x 256 JPEG) and captions go, in one run and one after the other, through
  bare    the encoders on ready tensors, at the best of some batch sizes, for the clock on all
          cores and for CPU time on one: in one process alone, and in as many at once as the job
          has workers, since busy cores slow each other; decoding timed apart;
  job     `ldm encode` as it is, from its first import to the published version, on Ray;
  loop    a single process that decodes, encodes, pads and torch.saves item by item, with as many
          threads as there are cores and in float32, whatever --precision says of the others.
Rates are pictures a second by the clock. Efficiency counts CPU time, of all of the job's processes,
Ray's own included: (bare encoding + bare decoding) / job, so that it says what share of the
processors' work the media need, however many there are. What a job takes once, some tens of CPU
seconds to start Ray and its workers, counts in full: more pictures make it a smaller share. By
default all of it takes three to four minutes on two cores.

--predict tells beforehand what `ldm encode --dry-run` would, and divides it by what came.
"""

import argparse
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from bare_encoders import MAX_TOKENS, Bare, bare_beside, timed
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from watched_job import run_job

from ldm_core.latents.codec import measured_embedding
from ldm_core.latents.store import LatentStore
from ldm_core.media.decode import decode_image
from ldm_core.media.pixels import to_pixels
from ldm_core.text.encoders import load_clip, load_t5
from pipelines.encode_estimate import estimate
from pipelines.encode_foretold import Estimate
from pipelines.encode_latents import MEASURED
from pipelines.encode_plan import describe_autoencoder, make_plan
from pipelines.recipes.schema import Recipe
from pipelines.recipes.sections import AutoencoderSection, EncodeSection, TextSection, Workers

SIZE = 256
WORDS = ("a", "red", "old", "house", "by", "the", "sea", "with", "two", "dogs", "and", "clouds")


def make_pictures(folder: Path, count: int) -> list[str]:
    """Soft random pictures, about as hard to decode as photographs, and captions of 8-40 words."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), []
    for k in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        noise.filter(ImageFilter.GaussianBlur(1.5)).save(folder / f"{k:05d}.jpg", quality=90)
        caption = " ".join(rng.choice(WORDS, rng.integers(8, 41))) + f" {k}"
        lines.append({"file": f"{k:05d}.jpg", "caption": caption})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [line["caption"] for line in lines]


def make_autoencoder(folder: Path) -> None:
    """Stable Diffusion's, at a quarter of its width: f8, 4 channels."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    ).save_pretrained(folder)


def recipe_of(root: Path, workers: int, precision: str) -> Recipe:
    return Recipe(
        name="bench",
        data=str(root / "pictures"),
        root=str(root / "run"),
        size=SIZE,
        autoencoder=AutoencoderSection(source=str(root / "vae")),
        text=TextSection(tiny_width=256, max_tokens=MAX_TOKENS),
        encode=EncodeSection(
            upscale=True,
            batch_size=8,
            shard_size=32,
            precision=precision,
            workers=Workers(count=workers),
        ),
    )


def predict(recipe: Recipe) -> Estimate | None:
    """What a dry run tells, measured on as few of the pictures."""
    recipe = recipe.located()
    plan = make_plan(recipe, describe_autoencoder(recipe))
    return estimate(plan, LatentStore(plan.job.store), recipe.encode, MEASURED)


def decoding(folder: Path, count: int) -> float:
    """CPU seconds a picture of decoding to tensors."""
    files = sorted(folder.glob("*.jpg"))[:count]
    _, cpu = timed(lambda: [to_pixels(decode_image(file.read_bytes())) for file in files])
    return cpu / count


def loop(recipe: Recipe, captions: list[str], folder: Path, out: Path, count: int) -> float:
    """Seconds a picture of the loop that many scripts have, with diffusers as it loads."""
    torch.set_num_threads(os.cpu_count() or 1)
    autoencoder = AutoencoderKL.from_pretrained(recipe.autoencoder_uri).eval()
    texts = [load_t5(recipe.t5_uri, MAX_TOKENS), load_clip(recipe.clip_uri, MAX_TOKENS)]
    out.mkdir()

    def work() -> None:
        for k, file in enumerate(sorted(folder.glob("*.jpg"))[:count]):
            image = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
            with torch.no_grad():
                posterior = autoencoder.encode(to_pixels(np.asarray(image))[None]).latent_dist
            tokens, pooled = (encoder.encode([captions[k]])[0] for encoder in texts)
            padded = torch.zeros(MAX_TOKENS, tokens.tokens.shape[1])
            padded[: len(tokens.tokens)] = tokens.tokens
            item = {"latent": posterior.mean[0], "text": padded, "pooled": pooled.pooled}
            torch.save(item, out / f"{k:05d}.pt")

    return timed(work)[0] / count


def print_bytes() -> None:
    """Of captions at T5-XXL's width, against rows padded to 256 tokens in 16 bits."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 61, (500,), generator=generator).tolist()
    padded = 2 * 4096 * 256 * len(lengths)
    for dtype in ("float16", "int8-b16"):
        size, largest = 0, 0.0
        for length in lengths:
            tokens = torch.randn(length, 4096, generator=generator)
            tokens[:, ::256] *= 50  # channels that stand out, as T5's do
            data, error = measured_embedding(tokens, dtype)
            size, largest = size + len(data), max(largest, error or 0.0)
        told = f", relative error of a caption at most {largest:.2%}" if largest else ""
        print(f"bytes of {dtype} tokens over padded 16-bit ones: {size / padded:.3f}{told}")


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--bare", type=int, default=48, help="pictures of the bare measurements")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--predict", action="store_true", help="what a dry run would have told")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))
    print_bytes()


def measure(args: argparse.Namespace, root: Path) -> None:
    """All three, and their ratios."""
    captions = make_pictures(root / "pictures", args.pictures)
    make_autoencoder(root / "vae")
    recipe = recipe_of(root, args.workers, args.precision)
    predicted = predict(recipe) if args.predict else None
    job_wall, job_cpu = (seconds / args.pictures for seconds in run_job(recipe))
    store = LatentStore(recipe.product("latents")).open_version()
    assert store.manifest.counts["samples"] == args.pictures
    files = sorted((root / "pictures").glob("*.jpg"))[: args.bare]
    pixels = torch.stack([to_pixels(decode_image(file.read_bytes())) for file in files])
    encoders = Bare(recipe, captions, pixels)
    _, bare_wall = encoders.best(os.cpu_count() or 1, clock=0)
    batch, bare_cpu = encoders.best(1, clock=1)
    beside_cpu = bare_beside(recipe, captions, pixels, batch, args.workers)
    decode_cpu = decoding(root / "pictures", args.bare)
    loop_wall = loop(recipe, captions, root / "pictures", root / "loop", args.bare)
    print(
        f"{args.pictures} pictures of {SIZE}, {args.workers} workers, {args.precision}, "
        f"torch {torch.__version__}"
    )
    at_once = f"{args.workers} at once"
    for name, parts in {
        "CPU": {
            "encoders alone": bare_cpu,
            f"encoders, {at_once}": beside_cpu,
            "decoding": decode_cpu,
            "job": job_cpu,
        },
        "wall": {"encoders": bare_wall, "job": job_wall, "loop": loop_wall},
    }.items():
        told = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in parts.items())
        print(f"{name} ms a picture: {told}")
    for how, cpu in {"one process alone": bare_cpu, at_once: beside_cpu}.items():
        share = (cpu + decode_cpu) / job_cpu
        print(f"efficiency by CPU time, (encoders, {how}, + decoding) / job: {share:.2f}")
    print(f"pictures a second, job / bare encoders: {bare_wall / job_wall:.2f}")
    print(f"pictures a second, job / loop: {loop_wall / job_wall:.2f}")
    if predicted:
        hours = job_wall * args.pictures / 3600
        print(f"predicted / measured hours: {predicted.hours(args.workers) / hours:.2f}")
        print(f"predicted / measured bytes: {predicted.bytes / store.manifest.bytes:.2f}")


if __name__ == "__main__":
    main()
