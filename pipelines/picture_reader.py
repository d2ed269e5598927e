"""The pictures the autoencoder is trained on and measured with, decoded once and kept."""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ldm_core import random
from ldm_core.errors import BadMedia, UserError
from ldm_core.latents.reader import sample_key
from ldm_core.media.decode import decode_image, fit_to_square
from ldm_core.media.folder import CaptionedImage, read_bytes
from ldm_core.media.pixels import to_pixels

HELD_OUT = 64
CACHE_BYTES = 2 << 30  # of decoded pictures, on every worker


class Pictures:
    """Pictures as tensors, decoded once.

    An unusable one gives way to another of its set: one that is trained on never stands in for one
    that is held out, nor the other way round.

    Attributes:
        trained, held_out: rows of the two sets; see `split`.
    """

    def __init__(self, images: list[CaptionedImage], size: int, seed: int) -> None:
        self.images, self.size = images, size
        self.trained, self.held_out = split(len(images), seed)
        self._next = {
            row: following
            for rows in (self.trained, self.held_out)
            for row, following in zip(rows.tolist(), np.roll(rows, -1).tolist(), strict=True)
        }
        self._pool = ThreadPoolExecutor(4)
        self._read = lru_cache(maxsize=CACHE_BYTES // (3 * self.size**2))(self._decode)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] and int64 ids (B,)."""
        found = list(self._pool.map(self._usable, rows.tolist()))
        pixels = torch.stack([to_pixels(array) for _, array in found])
        return pixels.contiguous(memory_format=torch.channels_last), torch.tensor(
            [sample_key(self.images[row].id) for row, _ in found]
        )

    def _decode(self, row: int) -> np.ndarray | None:
        try:
            return fit_to_square(decode_image(read_bytes(self.images[row].uri)), self.size)[0]
        except BadMedia:
            return None  # the encode stage reports it with its reason

    def _usable(self, row: int) -> tuple[int, np.ndarray]:
        for _ in range(len(self)):
            array = self._read(row)
            if array is not None:
                return row, array
            row = self._next[row]
        raise UserError(
            f"of the {len(self)} pictures none that are trained on, or none that are held out, can "
            "be decoded: replace the broken files"
        )


def split(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows held out, drawn from all: ids may be sorted by what they show."""
    order = random.permutation(seed, 0, count)
    held_out = min(HELD_OUT, max(1, count // 16))
    return order[held_out:] if count > 1 else order, order[:held_out]
