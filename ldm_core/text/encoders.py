"""Captions -> embeddings, by Hugging Face text encoders read from a folder or `s3://` URI.

Shapes: L tokens of the caption (true length, no padding), D token width, P pooled width.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_core.errors import UserError
from ldm_core.text.folders import digest_of, encoder_digest, model_folder, read_tokenizer
from ldm_core.text.uris import each_uri

# umt5 has position biases in every layer, which the class of t5 would silently leave out
T5_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}

CLIP_KINDS = ("clip", "clip_text_model")
_CLIP_POSITIONS, _CLIP_WIDTH = 77, 512  # where the config says nothing

Forward = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class TextEmbedding:
    """One caption: token embeddings (L, D) or None, pooled vector (P,) or None; float32, CPU."""

    tokens: Tensor | None
    pooled: Tensor | None


@dataclass(frozen=True)
class TextFacts:
    """What is known of a text encoder from its files, without its weights in memory.

    Attributes:
        digest: of weights, tokenizer and the token limit.
        width: D of the tokens.
        max_tokens: captions are cut here.
    """

    digest: str
    width: int
    max_tokens: int


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and the text model behind it, or two of them.

    Attributes:
        name: "t5", whichever gives the tokens, or "clip"; the store keeps a row per caption and
            name.
        digest: of weights, tokenizer and the token limit.
        width: D of the tokens, and P of the pooled vector for clip.
    """

    name: str
    digest: str
    width: int
    max_tokens: int
    _embed: Callable[[list[str]], list[TextEmbedding]]

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[TextEmbedding]:
        """Embed the captions in one batch; the padding is cut off again."""
        return self._embed(captions)


def load_t5(uri: str, max_tokens: int = 128, device: str | torch.device = "cpu") -> TextEncoder:
    """A T5 encoder (google/t5-v1_1-xxl and relatives, mT5, UMT5, ByT5); gives token embeddings.

    ByT5 is T5 whose tokens are the bytes of UTF-8: `max_tokens` are so many bytes and an end.

    Raises:
        UserError: nothing there, another kind of model, or pickled weights.
    """
    import transformers

    with model_folder(uri, T5_CLASSES) as (folder, kind):
        model, tokenizer = _read(getattr(transformers, T5_CLASSES[kind]), folder, uri, device)
        digest = encoder_digest(folder, max_tokens)

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state, None

    embed = partial(_embedded, tokenizer, forward, max_tokens, torch.device(device))
    return TextEncoder("t5", digest, int(model.config.d_model), max_tokens, embed)


def load_clip(
    uri: str, max_tokens: int = 77, device: str | torch.device = "cpu", tokens: bool = False
) -> TextEncoder:
    """A CLIP text model (openai/clip-vit-large-patch14 and relatives); gives the pooled vector.

    Captions are cut at the model's own number of positions if `max_tokens` is more.

    Args:
        uri: of the model, or "URI + URI" of two, as Stable Diffusion XL and 3 have them: their
            pooled vectors are laid side by side, and their tokens if they cut captions alike.
        max_tokens: captions are cut here.
        device: to compute on.
        tokens: whether it gives the last layer's token embeddings too.

    Raises:
        UserError: nothing there, another kind of model, or pickled weights.
    """
    parts = [_one_clip(each, max_tokens, device, tokens) for each in each_uri(uri)]
    return parts[0] if len(parts) == 1 else _side_by_side(parts)


def _one_clip(uri: str, max_tokens: int, device: str | torch.device, tokens: bool) -> TextEncoder:
    from transformers import CLIPTextModel

    with model_folder(uri, CLIP_KINDS) as (folder, _):
        model, tokenizer = _read(CLIPTextModel, folder, uri, device)
        facts = _clip_facts(folder, max_tokens)

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        out = model(input_ids=ids, attention_mask=mask)
        return out.last_hidden_state if tokens else None, out.pooler_output

    embed = partial(_embedded, tokenizer, forward, facts.max_tokens, torch.device(device))
    return TextEncoder("clip", facts.digest, facts.width, facts.max_tokens, embed)


def _side_by_side(parts: Sequence[TextEncoder]) -> TextEncoder:
    """One encoder of several: of each caption, their vectors one after the other."""

    def embed(captions: list[str]) -> list[TextEmbedding]:
        each = zip(*(part.encode(captions) for part in parts), strict=True)
        return [_joined(captions[k], embeddings) for k, embeddings in enumerate(each)]

    width, limit = sum(part.width for part in parts), max(part.max_tokens for part in parts)
    return TextEncoder("clip", digest_of([p.digest for p in parts]), width, limit, embed)


def _joined(caption: str, embeddings: Sequence[TextEmbedding]) -> TextEmbedding:
    pooled = [each.pooled for each in embeddings if each.pooled is not None]
    tokens = [each.tokens for each in embeddings if each.tokens is not None]
    lengths = {len(each) for each in tokens}
    if len(lengths) > 1:
        raise UserError(
            f"two CLIPs cut {caption!r} into {sorted(lengths)} tokens, which cannot lie "
            "side by side: take two with the same tokenizer, or their pooled vectors alone"
        )
    return TextEmbedding(torch.cat(tokens, dim=1) if tokens else None, torch.cat(pooled))


def _embedded(
    tokenizer: Any, forward: Forward, max_tokens: int, device: torch.device, captions: list[str]
) -> list[TextEmbedding]:
    """The captions of a batch, each without the padding that the batch needs."""
    batch = tokenizer(
        captions, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
    ).to(device)
    mask = batch["attention_mask"]
    tokens, pooled = forward(batch["input_ids"], mask)
    return [
        TextEmbedding(
            tokens[row, :length].float().cpu() if tokens is not None else None,
            pooled[row].float().cpu() if pooled is not None else None,
        )
        for row, length in enumerate(mask.sum(dim=1).tolist())
    ]


def describe_t5(uri: str, max_tokens: int = 128) -> TextFacts:
    """What `load_t5` would load, from the files alone; raises as it does."""
    with model_folder(uri, T5_CLASSES) as (folder, _):
        width = int(_config(folder)["d_model"])
        return TextFacts(encoder_digest(folder, max_tokens), width, max_tokens)


def describe_clip(uri: str, max_tokens: int = 77, tokens: bool = False) -> TextFacts:
    """What `load_clip` would load, of one or two, from the files alone.

    Raises:
        UserError: as `load_clip` does; or tokens are asked for of two that cut captions at
            different lengths.
    """
    parts = []
    for each in each_uri(uri):
        with model_folder(each, CLIP_KINDS) as (folder, _):
            parts.append(_clip_facts(folder, max_tokens))
    limits = [part.max_tokens for part in parts]
    if tokens and len(set(limits)) > 1:
        raise UserError(
            f"the CLIPs {uri} cut captions at {limits} tokens, which cannot lie side by side: take "
            f"two of one limit, set text.max_tokens={min(limits)}, or store their vectors alone"
        )
    width, limit = sum(part.width for part in parts), max(limits)
    return TextFacts(digest_of([part.digest for part in parts]), width, limit)


def t5_digest(uri: str, max_tokens: int = 128) -> str:
    """The digest of what `load_t5` would load; raises as it does."""
    return describe_t5(uri, max_tokens).digest


def clip_digest(uri: str, max_tokens: int = 77) -> str:
    """The digest of what `load_clip` would load; raises as it does."""
    return describe_clip(uri, max_tokens).digest


def _clip_facts(folder: Path, max_tokens: int) -> TextFacts:
    config = _config(folder)
    text = config.get("text_config") or config  # of the whole CLIP, or of its text model alone
    limit = min(max_tokens, int(text.get("max_position_embeddings", _CLIP_POSITIONS)))
    width = int(text.get("hidden_size", _CLIP_WIDTH))
    return TextFacts(encoder_digest(folder, limit), width, limit)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _read(kind: Any, folder: Path, uri: str, device: str | torch.device) -> tuple[Any, Any]:
    model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    return model.eval().to(device), read_tokenizer(folder, uri)
