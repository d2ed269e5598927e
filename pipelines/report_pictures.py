"""Pictures for the report: read back from the products and inlined as data URIs."""

import base64
import io

import numpy as np
from PIL import Image

from ldm_core.autoencoders.autoencoder import load_autoencoder
from ldm_core.errors import BadMedia
from ldm_core.files import read_bytes
from ldm_core.media.decode import decode_image, fit_to_square
from ldm_core.media.folder import list_captioned_images
from pipelines.evaluate_workers import reconstruct

GAP = 2  # pixels between the pictures of a sheet
THUMBNAIL, SHEET = 160, 1400  # greatest sides: a page stays a few megabytes, whatever the model


def data_uri(picture: np.ndarray, greatest_side: int = THUMBNAIL) -> str:
    """(H, W, 3) uint8 as an inline PNG, scaled down if it is larger."""
    image = Image.fromarray(picture)
    image.thumbnail((greatest_side, greatest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return png_uri(buffer.getvalue())


def png_uri(data: bytes) -> str:
    """PNG bytes as an inline image."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def read_picture(uri: str) -> np.ndarray:
    """A PNG of ours as (H, W, 3) uint8."""
    with Image.open(io.BytesIO(read_bytes(uri))) as image:
        return np.asarray(image.convert("RGB"))


def cut_sheet(sheet: np.ndarray, side: int, count: int) -> list[np.ndarray]:
    """The first `count` pictures of a sheet that `grid_image` laid out."""
    columns = (sheet.shape[1] - GAP) // (side + GAP)
    corners = [
        (GAP + index // columns * (side + GAP), GAP + index % columns * (side + GAP))
        for index in range(count)
    ]
    return [sheet[top : top + side, left : left + side] for top, left in corners]


def sample_pictures(folder: str, size: int, count: int) -> list[tuple[np.ndarray, str]]:
    """The first usable pictures of the data, as the models see them, with a caption each.

    Raises:
        UserError: no usable folder.
    """
    found: list[tuple[np.ndarray, str]] = []
    for image in list_captioned_images(folder).images:
        if len(found) == count:
            break
        try:
            square, _ = fit_to_square(decode_image(read_bytes(image.uri)), size)
        except BadMedia:
            continue  # the encode stage reports it with its reason
        found.append((square, image.captions[0]))
    return found


def reconstructions(pictures: list[np.ndarray], autoencoder_uri: str) -> np.ndarray:
    """The pictures (B, H, W, 3) after the way through the latent space.

    Raises:
        UserError: no autoencoder there.
    """
    return reconstruct(np.stack(pictures), load_autoencoder(autoencoder_uri))
