"""What gives a caption's tokens: the one place where a model's type decides how it is read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ldm_core.text.any_encoder import describe_any, load_any
from ldm_core.text.encoders import (
    CLIP_KINDS,
    T5_CLASSES,
    TextEmbedding,
    TextEncoder,
    TextFacts,
    describe_clip,
    describe_t5,
    load_clip,
    load_t5,
)
from ldm_core.text.folders import model_type
from ldm_core.text.uris import each_uri


@dataclass(frozen=True)
class _Family:
    """How a kind of text model is loaded, and described without its weights in memory."""

    load: Callable[[str, int, str | torch.device], TextEncoder]
    describe: Callable[[str, int], TextFacts]


def load_tokens(uri: str, max_tokens: int = 128, device: str | torch.device = "cpu") -> TextEncoder:
    """A text encoder of any family; gives token embeddings alone.

    Args:
        uri: of T5, mT5, UMT5 or ByT5, of CLIP or "URI + URI" of two, whose tokens lie side by side,
            or of another text model of transformers.
        max_tokens: captions are cut here, or at the model's own number of positions.
        device: to compute on.

    Raises:
        UserError: nothing there, no text model, pickled weights, or no tokenizer.
    """
    return _family(uri).load(uri, max_tokens, device)


def describe_tokens(uri: str, max_tokens: int = 128) -> TextFacts:
    """What `load_tokens` would load, from the files alone; raises as it does."""
    return _family(uri).describe(uri, max_tokens)


def _clip_tokens(uri: str, max_tokens: int, device: str | torch.device) -> TextEncoder:
    clip = load_clip(uri, max_tokens, device, tokens=True)

    def embed(captions: list[str]) -> list[TextEmbedding]:
        return [replace(each, pooled=None) for each in clip.encode(captions)]

    return replace(clip, name="t5", _embed=embed)


_T5, _CLIP = (
    _Family(load_t5, describe_t5),
    _Family(_clip_tokens, partial(describe_clip, tokens=True)),
)
_ANY = _Family(load_any, describe_any)
_KNOWN = {**dict.fromkeys(T5_CLASSES, _T5), **dict.fromkeys(CLIP_KINDS, _CLIP)}


def _family(uri: str) -> _Family:
    kinds = [model_type(each) for each in each_uri(uri)]
    return _CLIP if len(kinds) > 1 else _KNOWN.get(kinds[0] or "", _ANY)
