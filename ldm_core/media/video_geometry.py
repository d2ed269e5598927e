"""How the coded frames of a video are to lie and to be stretched when they are shown."""

from fractions import Fraction

import av


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counterclockwise quarter turns (0..3) that set the frame upright, by its metadata."""
    return round(frame.rotation / 90) % 4


def shown_size(frame: av.VideoFrame, pixel_aspect: Fraction) -> tuple[int, int]:
    """Height and width of the upright picture in square pixels, rounded.

    Players stretch the width, and turn the picture after that.

    Args:
        frame: as coded.
        pixel_aspect: width over height of a coded pixel (ITU-T H.273, SampleAspectRatio).
    """
    height, width = frame.height, shown_width(frame.width, pixel_aspect)
    return (width, height) if quarter_turns(frame) % 2 else (height, width)


def shown_width(width: int, pixel_aspect: Fraction) -> int:
    """The width of coded pixels in square ones, at least one."""
    return max(1, int(width * pixel_aspect + Fraction(1, 2)))
