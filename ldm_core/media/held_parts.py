"""`decode_parts` in a process of its own that keeps its last file: it is sent a film once for many
calls, one for some of its clips each."""

from collections.abc import Sequence

from ldm_core.errors import BadMedia
from ldm_core.media.clips import Clip
from ldm_core.media.parts import Pixels, decode_parts

_last: dict[str, bytes] = {}


class NotHeld(LookupError):
    """The process has another file or none: send this one."""


def decode_held_parts(
    data: bytes | None,
    name: str,
    kind: str,
    clips: Sequence[Clip | None],
    bucket: str,
    seconds: float,
) -> list[Pixels | BadMedia]:
    """Some parts of a file; see `decode_parts`.

    Args:
        data: the whole file, which is kept until there is another; None for the one that is kept.
        name: of the file, by which it is known again.
        kind, clips, bucket, seconds: as `decode_parts` takes them.

    Raises:
        NotHeld: it is not the one that is kept, and now none is, so that there is room for it.
    """
    if data is not None:
        _last.clear()
        _last[name] = data
    elif name not in _last:
        _last.clear()
        raise NotHeld(name)
    return decode_parts(_last[name], kind, clips, bucket, seconds)
