"""A decoded video frame -> upright 8-bit sRGB."""

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from ldm_core.errors import BadMedia
from ldm_core.media.video_geometry import quarter_turns
from ldm_core.media.wide_colours import BT2020, HLG, PQ, UNNAMED, is_wide, to_srgb

_HD_HEIGHT = 720  # a frame that names no colour matrix: BT.709 if so high


def upright_srgb(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    """(H, W, 3) uint8, in coded pixels: those of BT.709's and older primaries are taken as they
    are, others by `to_srgb`.

    Raises:
        BadMedia: "undecodable".
    """
    try:
        turns = quarter_turns(frame)
        return np.ascontiguousarray(np.rot90(_srgb(frame, converter), turns))
    except Exception as error:  # a damaged file can make a parser raise anything
        raise BadMedia("decode", "undecodable", f"{type(error).__name__}: {error}") from error


def _srgb(frame: av.VideoFrame, converter: VideoReformatter) -> np.ndarray:
    transfer, primaries = frame.color_trc, frame.color_primaries
    wide = is_wide(transfer, primaries)
    pixels = converter.reformat(
        frame,
        format="gbrp16le" if wide else "rgb24",
        src_colorspace=_unnamed_matrix(frame) if frame.colorspace == UNNAMED else None,
        threads=1,
    ).to_ndarray()
    return to_srgb(pixels, transfer, primaries) if wide else pixels


def _unnamed_matrix(frame: av.VideoFrame) -> Colorspace | None:
    if frame.color_trc in (PQ, HLG) or frame.color_primaries == BT2020:
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.height >= _HD_HEIGHT else None
