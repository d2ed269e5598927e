"""Video of more light or more colours than sRGB has -> sRGB: PQ, HLG, and BT.2020 or P3 primaries.

The signal becomes light (ITU-R BT.2100-2, tables 4 and 5), highlights are rolled off (the EETF of
ITU-R BT.2408-7, annex 5, earlier in BT.2390), primaries are converted (ITU-R BT.2407-0), and the
light is encoded by IEC 61966-2-1. White is 203 cd/m2, HDR's diffuse white (BT.2408-7). Light below
88 cd/m2 keeps its level, diffuse white becomes level 229 of 255, and 1000 cd/m2, which HLG's
nominal screen ends at and most of PQ is mastered for, becomes 255, as does all above. The curve is
fixed, since one that followed the scene, or a file's statement about itself, would flicker between
clips.

SDR of such primaries is taken to be encoded as sRGB, as that of BT.709 is everywhere here: its grey
keeps its level. A colour outside sRGB is clipped in each channel.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

WHITE, PEAK = 203.0, 1000.0  # cd/m2
PQ, HLG = 16, 18  # ITU-T H.273, TransferCharacteristics
BT2020, P3_D65 = 9, 12  # ITU-T H.273, ColourPrimaries
UNNAMED = 2

Transfer = Callable[[np.ndarray], np.ndarray]

_CODES = 1 << 16
_SIGNAL_WHITE = 255 << 8  # FFmpeg's scaler shifts 8 bits to make 16 of them
_ROWS = 64  # at once: the float values of a whole frame of 8K would be half a gigabyte
_WHITE_POINT = (0.3127, 0.3290)
_BT709_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_PRIMARIES = {
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3_D65: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


def is_wide(transfer: int, primaries: int) -> bool:
    """Whether such a signal is none that sRGB's pixels can be taken for."""
    return transfer in _TRANSFERS or primaries in _PRIMARIES


def to_srgb(signal: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """(H, W, 3) uint16 R'G'B' -> (H, W, 3) uint8 sRGB.

    Args:
        signal: 0 .. 65280 (255 * 256) stands for 0 .. 1.
        transfer: code point of ITU-T H.273; others than PQ and HLG are taken for sRGB's.
        primaries: code point of ITU-T H.273; HDR that names none has BT.2020's, and other ones
            that are not listed here are taken for BT.709's.
    """
    light = _TRANSFERS.get(transfer, _from_srgb)
    if transfer in _TRANSFERS and primaries == UNNAMED:
        primaries = BT2020
    matrix = to_bt709(primaries).astype(np.float32).T
    levels = np.empty(signal.shape, np.uint8)
    for top in range(0, len(signal), _ROWS):
        linear = light(signal[top : top + _ROWS]) @ matrix
        levels[top : top + _ROWS] = _srgb_levels()[_roots(linear)]
    return levels


def pq_light(signal: np.ndarray) -> np.ndarray:
    """PQ's EOTF: signal 0..1 -> cd/m2, 0..10000 (BT.2100-2, table 4; SMPTE ST 2084)."""
    root = np.asarray(signal, np.float64) ** (1 / _M2)
    return 1e4 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def pq_signal(light: np.ndarray) -> np.ndarray:
    """The inverse of `pq_light`."""
    root = (np.asarray(light, np.float64) / 1e4) ** _M1
    return ((_C1 + _C2 * root) / (1 + _C3 * root)) ** _M2


def hlg_scene(signal: np.ndarray) -> np.ndarray:
    """HLG's inverse OETF: signal 0..1 -> the scene's light, 0..1 (BT.2100-2, table 5)."""
    signal = np.asarray(signal, np.float64)
    bright = (np.exp((np.maximum(signal, 0.5) - _HLG_C) / _HLG_A) + _HLG_B) / 12
    return np.where(signal <= 0.5, signal**2 / 3, bright)


def tone_map(light: np.ndarray) -> np.ndarray:
    """Light of a screen of `PEAK` -> of one of `WHITE`, cd/m2: the EETF, black at 0."""
    source = pq_signal(np.array(PEAK))
    level = np.minimum(pq_signal(light) / source, 1)
    top = pq_signal(np.array(WHITE)) / source
    knee = 1.5 * top - 0.5
    t = np.clip((level - knee) / (1 - knee), 0, 1)
    rolled = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * top
    )
    return pq_light(np.where(level < knee, level, rolled) * source)


def to_bt709(primaries: int) -> np.ndarray:
    """(3, 3): linear RGB of these primaries -> of BT.709's, both with white D65."""
    own = _PRIMARIES.get(primaries, _BT709_PRIMARIES)
    return np.linalg.inv(_to_xyz(_BT709_PRIMARIES)) @ _to_xyz(own)


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """(3, 3): linear RGB -> CIE XYZ, by the chromaticities (SMPTE RP 177)."""
    red_green_blue = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    x, y = _WHITE_POINT
    return red_green_blue * np.linalg.solve(red_green_blue, (x / y, 1, (1 - x - y) / y))


def _from_pq(signal: np.ndarray) -> np.ndarray:
    return _pq_table()[signal]


def _from_hlg(signal: np.ndarray) -> np.ndarray:
    """By the OOTF of a screen of 1000 cd/m2: gamma 1.2 of the scene's luminance."""
    scene = _hlg_table()[signal]
    luminance = scene @ np.array((0.2627, 0.6780, 0.0593), np.float32)
    return _tone_table()[_roots(scene * luminance[..., None] ** np.float32(0.2))]


def _from_srgb(signal: np.ndarray) -> np.ndarray:
    return _srgb_table()[signal]


_TRANSFERS: dict[int, Transfer] = {PQ: _from_pq, HLG: _from_hlg}

_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_HLG_A = 0.17883277
_HLG_B = 1 - 4 * _HLG_A
_HLG_C = 0.5 - _HLG_A * np.log(4 * _HLG_A)


def _roots(light: np.ndarray) -> np.ndarray:
    """Light 0..1 -> index of a table that is as fine near black as eyes are."""
    return np.rint(np.sqrt(np.clip(light, 0, 1)) * (_CODES - 1)).astype(np.uint16)


def _signals() -> np.ndarray:
    """What every 16-bit value of a frame stands for, 0..1."""
    return np.minimum(np.arange(_CODES) / _SIGNAL_WHITE, 1)


def _lights() -> np.ndarray:
    """What every index of `_roots` stands for, 0..1."""
    return (np.arange(_CODES) / (_CODES - 1)) ** 2


# Tables of all values, made when the first such frame is seen; their light is relative to white.


@cache
def _pq_table() -> np.ndarray:
    return (tone_map(pq_light(_signals())) / WHITE).astype(np.float32)


@cache
def _hlg_table() -> np.ndarray:
    return hlg_scene(_signals()).astype(np.float32)


@cache
def _tone_table() -> np.ndarray:
    """By `_roots` of light relative to the peak."""
    return (tone_map(_lights() * PEAK) / WHITE).astype(np.float32)


@cache
def _srgb_table() -> np.ndarray:
    signal = _signals()
    bright = ((signal + 0.055) / 1.055) ** 2.4
    return np.where(signal <= 0.04045, signal / 12.92, bright).astype(np.float32)


@cache
def _srgb_levels() -> np.ndarray:
    """By `_roots` of light relative to white, uint8."""
    light = _lights()
    bright = 1.055 * light ** (1 / 2.4) - 0.055
    return np.rint(255 * np.where(light <= 0.0031308, 12.92 * light, bright)).astype(np.uint8)
