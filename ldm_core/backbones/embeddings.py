"""Numbers as vectors, with nothing to learn: timesteps, places on a grid, rotary angles; patches.

Shapes: B batch, C channels, T x H x W latent size, p patch size, h = H / p, w = W / p, N tokens,
D width, K head width.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm_core.errors import UserError

Grid = tuple[int, int, int]  # frames, rows and columns of tokens; N is their product
RotaryTable = tuple[Tensor, Tensor]  # cosines and sines, (N, K / 2) each


def timestep_waves(timestep: Tensor, pairs: int = 128, closed: bool = False) -> Tensor:
    """Cosines, then sines, of timestep x 10000^(-i / pairs) (Ho et al. 2020, App. B).

    Args:
        timestep: (B,), float32 or wider.
        pairs: of a cosine and a sine.
        closed: whether the last frequency is 1 / 10000 itself, with pairs - 1 in the exponent.

    Returns:
        (B, 2 * pairs).
    """
    i = torch.arange(pairs, dtype=timestep.dtype, device=timestep.device)
    frequencies = torch.exp(-math.log(10_000) * i / (pairs - closed))
    angles = timestep[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def geometric_waves(x: Tensor, lowest: float, highest: float, pairs: int) -> Tensor:
    """Cosines, then sines, of x times a geometric row of frequencies: (B,) -> (B, 2 * pairs)."""
    frequencies = torch.logspace(
        math.log2(lowest), math.log2(highest), pairs, 2.0, dtype=x.dtype, device=x.device
    )
    angles = x[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def place_waves(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Sines and cosines of a token's column, then of its row: (h,), (w,) -> (h w, D).

    The fixed positions of ViT and DiT (Peebles & Xie 2023, Sec. 3.1), frequencies as in Vaswani et
    al. 2017, Sec. 3.5. Only h + w places are computed, then laid out as a grid.
    """
    by_row, by_column = (_sines(at, width // 2) for at in (rows, columns))  # (h or w, D / 2)
    h, w = len(rows), len(columns)
    waves = [by_column[None].expand(h, -1, -1), by_row[:, None].expand(-1, w, -1)]
    return torch.cat(waves, dim=-1).flatten(0, 1)


def frame_waves(frames: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of a frame's number, less those of the first: (T, D).

    The fixed positions of frames that Latte (Ma et al. 2024, Sec. 3.3) adds to those of places; but
    for the difference, by which a picture is a video of one frame.
    """
    waves = _sines(torch.arange(frames, device=device), width)
    return waves - waves[:1]


def _sines(at: Tensor, width: int) -> Tensor:
    """(n,) places -> (n, width): sines, then cosines, of geometric frequencies down from 1."""
    half = width // 2
    i = torch.arange(half, dtype=torch.float64, device=at.device)
    angles = torch.outer(at.double(), 10_000.0 ** (-i / half))
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def grid_rotary(
    grid: tuple[int, ...],
    pairs: tuple[int, ...],
    device: torch.device,
    base: float = 100.0,
    centred: bool = True,
) -> RotaryTable:
    """Rotary angles of a grid: as many pairs of a head as given turn with each of its axes.

    RoPE (Su et al. 2021, Eq. 15), per axis as in Heo et al. 2024. The first axis is the slowest.

    Args:
        grid: positions along each axis.
        pairs: pairs of channels that turn with each axis; K / 2 together.
        device: where the table is made.
        base: frequencies of an axis with P pairs are base^(-i / P).
        centred: count from the middle of the grid, else from its first corner. From the middle,
            unrotated tokens sit at the centre, which keeps its angles whatever the size.
    """
    angles = []
    for axis, (size, count) in enumerate(zip(grid, pairs, strict=True)):
        frequencies = base ** (-torch.arange(count, device=device) / count)  # (P,)
        places = torch.arange(size, device=device) - (size - 1) / 2 * centred
        shape = [1] * len(grid) + [count]
        shape[axis] = size
        angles.append(torch.outer(places, frequencies).view(shape).expand(*grid, count))
    table = torch.cat(angles, dim=-1).flatten(0, -2)  # (N, K / 2)
    return table.cos(), table.sin()


def patch_grid(latent_size: Sequence[int], patch_size: int) -> tuple[int, int]:
    """(H, W) -> (h, w), rows and columns of tokens.

    Raises:
        UserError: H or W is not a multiple of the patch size.
    """
    height, width = latent_size
    if height % patch_size or width % patch_size:
        raise UserError(
            f"a latent of {height} x {width} does not divide into patches of "
            f"{patch_size} x {patch_size}: crop it or choose another patch_size"
        )
    return height // patch_size, width // patch_size


def check_channels(x_t: Tensor, embedding: nn.Module, patch_size: int) -> None:
    """Refuse latents (B, C, ...) that are not the patch embedding's; a widened one sees itself.

    Raises:
        UserError: another number of channels.
    """
    if isinstance(embedding, nn.Linear) and embedding.in_features != x_t.shape[1] * patch_size**2:
        raise UserError(
            f"latents of {x_t.shape[1]} channels for a network of "
            f"{embedding.in_features // patch_size**2}: encode with the autoencoder it was "
            "trained with"
        )


def patchify(x: Tensor, patch_size: int) -> tuple[Tensor, Grid]:
    """(B, C, T, H, W), or (B, C, H, W) for T = 1 -> (B, N, C p^2), channels slowest, and (T, h, w).

    Raises:
        UserError: H or W is not a multiple of the patch size.
    """
    frames = x if x.ndim == 5 else x.unsqueeze(2)
    grid = (frames.shape[2], *patch_grid(x.shape[-2:], patch_size))
    pattern = "b c t (h p) (w q) -> b (t h w) (c p q)"
    return rearrange(frames, pattern, p=patch_size, q=patch_size), grid


def unpatchify(patches: Tensor, grid: Grid, patch_size: int, video: bool = True) -> Tensor:
    """`patchify` backwards: (B, N, C p^2) -> (B, C, T, H, W), without T if it is no video."""
    t, h, w = grid
    pattern = "b (t h w) (c p q) -> b c t (h p) (w q)"
    frames = rearrange(patches, pattern, t=t, h=h, w=w, p=patch_size, q=patch_size)
    return frames if video else frames.squeeze(2)
