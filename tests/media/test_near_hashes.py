"""Near difference hashes, against all pairs compared; and what becomes of saved pictures."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage

from ldm_core.media.buckets import Bucket, fit
from ldm_core.media.near_hashes import NEAR, TEXTURED, groups_of
from ldm_core.media.perceptual_hash import difference_hash


def hashes(count, seed=0):
    """Of even numbers of both bits, as textured pictures have them."""
    return np.random.default_rng(seed).integers(0, 1 << 64, count, np.uint64)


def flipped(values, bits, seed=1):
    """The hashes with that many of their bits changed, of each other ones."""
    rng = np.random.default_rng(seed)
    which = np.stack([rng.choice(64, bits, replace=False) for _ in values])
    return values ^ (np.uint64(1) << which.astype(np.uint64)).sum(axis=1, dtype=np.uint64)


def partition(groups):
    """The groups as sets of rows, whatever their numbers."""
    found = {}
    for row, group in enumerate(groups.tolist()):
        found.setdefault(group, set()).add(row)
    return {frozenset(rows) for rows in found.values()}


def bits_of(values):
    return (values[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)


@pytest.mark.parametrize("least", [0, 1, 2, 3])
def test_the_groups_are_those_of_all_pairs(least):
    """scipy's single linkage at a Hamming distance of 3; chains of near ones are one group."""
    some = hashes(150)
    values = np.concatenate([some, flipped(some, least), flipped(some[:40], 3), flipped(some, 5)])
    values = np.random.default_rng(2).permutation(values)
    tree = linkage(bits_of(values).astype(bool), "single", metric="hamming")
    expected = fcluster(tree, (NEAR + 0.5) / 64, "distance")
    assert partition(groups_of(values.view(np.int64))) == partition(expected)


@pytest.mark.parametrize("bits", range(1, 7))
def test_three_bits_are_near_and_four_are_not(bits):
    values = hashes(20_000)
    values = values[np.abs(np.bitwise_count(values).astype(int) - 32) <= 32 - TEXTURED - bits]
    half = len(values)
    groups = groups_of(np.concatenate([values, flipped(values, bits)]).view(np.int64))
    together = groups[:half] == groups[half:]
    assert together.all() if bits <= NEAR else not together.any()


def test_flat_pictures_are_alike_only_if_their_hashes_are_equal():
    """Else a chain leads from each to any other: all with three bits set, and all with four."""
    rng = np.random.default_rng(0)
    bits = [rng.choice(64, 3 + n % 2, replace=False) for n in range(3000)]
    few = np.array([sum(1 << int(bit) for bit in some) for some in bits], np.uint64)
    groups = groups_of(few.view(np.int64))
    assert len(set(groups.tolist())) == len(set(few.tolist()))
    busy = (np.uint64(1) << np.uint64(TEXTURED)) - np.uint64(1)
    pair = np.array([busy, busy | np.uint64(1) << np.uint64(40)]).view(np.int64)
    assert len(set(groups_of(pair))) == 1


def test_very_many_near_ones_are_one_group():
    """More than a hash is compared with."""
    centre = hashes(1)[0]
    shell = centre ^ np.array([1 << a | 1 << b for a in range(64) for b in range(a)], np.uint64)
    assert len(set(groups_of(shell.view(np.int64)).tolist())) == 1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_hashes(count):
    values = np.array([5, 5], np.int64)[:count]
    assert len(set(groups_of(values).tolist())) == min(count, 1)


def natural(seed, side=128):
    """A picture with a photograph's spectrum: amplitudes fall as 1 / frequency."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    radius[0, 0] = np.inf
    waves = rng.normal(size=(4, *radius.shape, 2)) @ (1, 1j) / radius
    planes = np.fft.irfft2(waves, s=(side, side))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    levels = np.clip(128 + 40 * planes[0] + 20 * planes[1:], 0, 255)
    return Image.fromarray(levels.astype(np.uint8).transpose(1, 2, 0))


def versions(picture):
    """The picture, saved as people save it again."""
    yield picture
    for quality in (95, 75, 50):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        yield Image.open(buffer).convert("RGB")
    for part in (0.95, 0.8, 0.5):
        side = round(part * picture.width)
        yield picture.resize((side, side), Image.Resampling.LANCZOS)


def hash_in_store(picture):
    return difference_hash(fit(np.asarray(picture), Bucket(64, 64))[0])


def test_pictures_saved_anew_are_alike_and_others_are_not():
    found = [hash_in_store(one) for k in range(30) for one in versions(natural(k))]
    rows = [range(row, row + 7) for row in range(0, 210, 7)]
    assert sum(len({found[row] for row in some}) > 1 for some in rows) > 10  # not all are equal
    assert partition(groups_of(np.array(found))) == set(map(frozenset, rows))
