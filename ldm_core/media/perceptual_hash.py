"""A number that pictures which look alike have in common."""

import numpy as np
from PIL import Image


def difference_hash(image: np.ndarray) -> int:
    """dHash (Krawetz 2013) of an (H, W, 3) uint8 picture, as a signed 64-bit integer.

    Shrunk to 9 x 8 grey levels, each bit says whether a level is darker than its right neighbour:
    scaling, recompression and brightness leave nearly all of them.
    """
    grey = Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.int16)
    bits = np.packbits(levels[:, :-1] < levels[:, 1:])
    return int.from_bytes(bits.tobytes(), "big", signed=True)
