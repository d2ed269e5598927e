"""`ldm sample`: prompts -> PNG files that remember what they were drawn from."""

import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from ldm_core.errors import UserError
from ldm_core.files import is_remote, join, write_bytes
from ldm_core.generation import (
    DEFAULT_SAMPLER,
    PictureGenerator,
    PictureRequest,
    annotate,
    grid_image,
)
from ldm_core.samplers.choice import SamplerChoice
from pipelines.credentials import masked
from pipelines.model_uri import model_uri
from pipelines.progress import Progress

BATCH = 16
MAX_PICTURES = 4096
KEY = "ldm"  # of the PNG's text chunk, as `annotate` writes it


def sample_images(
    model: str, requests: Sequence[PictureRequest], out: str, columns: int | None, device: str
) -> list[str]:
    """Draw the pictures and write them with their requests; returns the URIs of the files.

    Args:
        model: model directory, `s3://` URI, or `models:/name@alias`.
        requests: see `picture_requests`.
        out: a .png file that holds all, or a folder for a file each: it ends in / or exists.
        columns: of the one file; None makes it about square.
        device: "cpu", "cuda", …; "auto" takes a GPU if there is one.

    Raises:
        UserError: no such model or device, something it cannot draw, or no place to write it.
    """
    folder = _is_folder(out)
    if sys.stderr.isatty():
        print(f"loading {masked(model)}", file=sys.stderr, flush=True)
    generator = PictureGenerator.load(model_uri(model), _usable(device))
    for request in requests:
        generator.check(request)
    _check_place(out, folder)
    pictures = _draw(generator, requests)
    pairs = zip(pictures, requests, strict=True)
    files = [annotate(picture, request, generator) for picture, request in pairs]
    if not folder:
        write_bytes(out, files[0] if len(files) == 1 else _sheet(pictures, files, columns))
        return [out]
    uris = [join(out, f"{index:04d}.png") for index in range(len(files))]
    for uri, data in zip(uris, files, strict=True):
        write_bytes(uri, data)
    return uris


def picture_requests(
    prompts: Sequence[str],
    count: int,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: SamplerChoice | None = None,
) -> list[PictureRequest]:
    """`count` pictures of each prompt; those of every prompt have seed, seed + 1, ….

    Raises:
        UserError: too many, or none, or an empty prompt, which the endpoint refuses as well.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("--prompt is empty: say in words what to draw")
    if not 1 <= count * len(prompts) <= MAX_PICTURES:
        raise UserError(
            f"{len(prompts)} prompts with {count} pictures each; ask for 1 to {MAX_PICTURES} in all"
        )
    return [
        PictureRequest(prompt, seed + i, steps, guidance, sampler)
        for prompt in prompts
        for i in range(count)
    ]


def sampler_choice(name: str | None, eta: float | None) -> SamplerChoice | None:
    """What was chosen, if anything; eta alone is Euler's, which has none, and is refused."""
    if name is None and eta is None:
        return None
    return SamplerChoice(name or DEFAULT_SAMPLER.name, eta)


def _is_folder(out: str) -> bool:
    if out.endswith("/") or Path(out).is_dir():
        return True
    if not out.lower().endswith(".png"):
        raise UserError(f"--out {out}: end it in .png for one file, or in / for one each")
    return False


def _usable(device: str) -> str:
    """The device, `auto` decided, if something can be computed there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch has both for what is not there
        raise UserError(
            f"--device {device} cannot be used on this machine; choose cpu, or auto, which takes "
            "a GPU if there is one"
        ) from error
    return device


def _check_place(out: str, folder: bool) -> None:
    """Make the folder and try to write there, before time goes into pictures nobody would get."""
    if is_remote(out):
        return
    place = Path(out) if folder else Path(out).parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot write in {place} ({error.strerror}); name another place"
        ) from error


def _draw(generator: PictureGenerator, requests: Sequence[PictureRequest]) -> np.ndarray:
    """(B, H, W, 3) uint8, batch by batch."""
    with Progress("sample", len(requests), "pictures") as bar:
        drawn = []
        bar.update(0)  # from here on it measures the rate
        for start in range(0, len(requests), BATCH):
            drawn.append(generator.generate(requests[start : start + BATCH]))
            bar.update(min(start + BATCH, len(requests)))
    return np.concatenate(drawn)


def _sheet(pictures: np.ndarray, files: Sequence[bytes], columns: int | None) -> bytes:
    """One PNG of all pictures; its text chunk is the list of theirs, row by row."""
    texts = [json.loads(Image.open(io.BytesIO(data)).info[KEY]) for data in files]
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(texts, ensure_ascii=True))
    buffer = io.BytesIO()
    Image.fromarray(grid_image(pictures, columns)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()
