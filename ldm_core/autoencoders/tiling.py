"""Large pictures and videos encoded in overlapping tiles, in the memory of one of them.

diffusers' autoencoders can tile too, each class in its own way; this is one way for all. Every tile
has the full size, so that the statistics of normalisation layers, which see a tile at a time, are
of as many pixels everywhere. Where tiles overlap, means and log-variances are blended linearly.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_core.autoencoders.autoencoder import Autoencoder, Posterior
from ldm_core.errors import UserError

OVERLAP = 4  # a tile shares a quarter of its side with the next, as diffusers' do


class TiledAutoencoder:
    """An autoencoder that encodes in tiles what is larger than one; attributes are the other's.

    Decoding is the other's. The mean differs from that of the whole picture near seams, where
    convolutions see padding, and as far as normalisation and attention look beyond a tile.

    Args:
        whole: the other.
        tile: its side in pixels; see `check_tile`.
    """

    def __init__(self, whole: Autoencoder, tile: int) -> None:
        check_tile(tile, whole.downsampling)
        self.whole, self.tile = whole, tile
        self.digest, self.channels = whole.digest, whole.channels
        self.downsampling = whole.downsampling
        self.temporal_downsampling = whole.temporal_downsampling
        self.latents_mean, self.latents_std = whole.latents_mean, whole.latents_std

    def encode(self, pixels: Tensor) -> Posterior:
        """As the autoencoder does, (B, 3, H, W) or (B, 3, T, H, W); one tile at a time."""
        if max(pixels.shape[-2:]) <= self.tile:
            return self.whole.encode(pixels)
        return encode_tiled(self.whole.encode, pixels, self.tile, self.downsampling)

    def decode(self, latents: Tensor) -> Tensor:
        """As the autoencoder does."""
        return self.whole.decode(latents)


def check_tile(tile: int, downsampling: int) -> None:
    """Make sure that tiles, and what they share, are whole latents.

    Raises:
        UserError: they are not.
    """
    unit = OVERLAP * downsampling
    if tile % unit:
        raise UserError(
            f"encode.tile is {tile}, no multiple of {unit} ({OVERLAP} latents of this "
            f"autoencoder): try {max(1, round(tile / unit)) * unit}"
        )


def encode_tiled(
    encode: Callable[[Tensor], Posterior], pixels: Tensor, tile: int, downsampling: int
) -> Posterior:
    """The posterior over (…, H, W) from those of tiles of at most `tile` pixels a side."""
    height, width = (size // downsampling for size in pixels.shape[-2:])
    side = tile // downsampling
    sums: list[Tensor] = []
    weights = torch.zeros(height, width, device=pixels.device)
    for top in tile_starts(height, side):
        for left in tile_starts(width, side):
            rows, columns = slice(top, top + side), slice(left, left + side)
            part = pixels[..., _pixels(rows, downsampling), _pixels(columns, downsampling)]
            found = encode(part)
            weight = torch.outer(*(_ramp(size) for size in found.mean.shape[-2:])).to(weights)
            for k, values in enumerate((found.mean, found.logvar)):
                if len(sums) == k:
                    sums.append(values.new_zeros(*values.shape[:-2], height, width))
                sums[k][..., rows, columns] += values * weight.to(values)
            weights[rows, columns] += weight
    mean, logvar = (total / weights.to(total) for total in sums)
    return Posterior(mean, logvar)


def tile_starts(length: int, side: int) -> list[int]:
    """Where tiles begin, evenly spread, so that neighbours share at least a quarter of a side."""
    if length <= side:
        return [0]
    most = side - side // OVERLAP
    steps = -(-(length - side) // most)
    return [k * (length - side) // steps for k in range(steps + 1)]


def _pixels(latents: slice, downsampling: int) -> slice:
    return slice(latents.start * downsampling, latents.stop * downsampling)


def _ramp(size: int) -> Tensor:
    """(size,): 1 in the middle, falling towards the ends over a quarter of the side."""
    place = torch.arange(1, size + 1)
    edge = torch.minimum(place, place.flip(0))
    return (edge / (1 + size // OVERLAP)).clamp(max=1)
