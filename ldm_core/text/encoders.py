"""Captions -> embeddings, by Hugging Face text encoders read from a folder or `s3://` URI.

Shapes: L tokens of the caption (true length, no padding), D token width, P pooled width.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_core.errors import UserError
from ldm_core.files import exists, folder_digest, join, local_copy, read_json
from ldm_core.text.uris import each_uri

_BOOKKEEPING = {"transformers_version", "_name_or_path", "is_local", "local_files_only"}
# umt5 has position biases in every layer, which the class of t5 would silently leave out
_T5_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}

_CLIP_KINDS = ("clip", "clip_text_model")
_CLIP_POSITIONS = 77  # where the config says nothing

Forward = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class TextEmbedding:
    """One caption: token embeddings (L, D) or None, pooled vector (P,) or None; float32, CPU."""

    tokens: Tensor | None
    pooled: Tensor | None


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and the text model behind it, or two of them.

    Attributes:
        name: "t5" or "clip"; the store keeps a row per caption and encoder.
        digest: of weights, tokenizer and the token limit.
        width: D of the tokens for t5, P of the pooled vector for clip.
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
    """A T5 encoder (google/t5-v1_1-xxl and relatives); gives token embeddings.

    Raises:
        UserError: nothing there, another kind of model, or pickled weights.
    """
    import transformers

    with _model_folder(uri, _T5_CLASSES) as (folder, kind):
        model, tokenizer = _read(getattr(transformers, _T5_CLASSES[kind]), folder, device)
        digest = _t5_digest(folder, max_tokens)

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

    with _model_folder(uri, _CLIP_KINDS) as (folder, _):
        model, tokenizer = _read(CLIPTextModel, folder, device)
        limit, digest = _clip_limit(folder, max_tokens), _clip_digest(folder, max_tokens)

    def forward(ids: Tensor, mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        out = model(input_ids=ids, attention_mask=mask)
        return out.last_hidden_state if tokens else None, out.pooler_output

    embed = partial(_embedded, tokenizer, forward, limit, torch.device(device))
    return TextEncoder("clip", digest, int(model.config.hidden_size), limit, embed)


def _side_by_side(parts: Sequence[TextEncoder]) -> TextEncoder:
    """One encoder of several: of each caption, their vectors one after the other."""

    def embed(captions: list[str]) -> list[TextEmbedding]:
        each = zip(*(part.encode(captions) for part in parts), strict=True)
        return [_joined(captions[k], embeddings) for k, embeddings in enumerate(each)]

    width, limit = sum(part.width for part in parts), max(part.max_tokens for part in parts)
    return TextEncoder("clip", _digest_of([p.digest for p in parts]), width, limit, embed)


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


def t5_digest(uri: str, max_tokens: int = 128) -> str:
    """The digest of what `load_t5` would load, from the files alone; raises as it does."""
    with _model_folder(uri, _T5_CLASSES) as (folder, _):
        return _t5_digest(folder, max_tokens)


def t5_width(uri: str) -> int:
    """D of the tokens of what `load_t5` would load."""
    return int(read_json(join(uri, "config.json"))["d_model"])


def clip_digest(uri: str, max_tokens: int = 77) -> str:
    """The digest of what `load_clip` would load, from the files alone; raises as it does."""
    found = []
    for each in each_uri(uri):
        with _model_folder(each, _CLIP_KINDS) as (folder, _):
            found.append(_clip_digest(folder, max_tokens))
    return found[0] if len(found) == 1 else _digest_of(found)


def _digest_of(digests: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def _t5_digest(folder: Path, max_tokens: int) -> str:
    return f"{_encoder_digest(folder)}-{max_tokens}"


def _clip_digest(folder: Path, max_tokens: int) -> str:
    return f"{_encoder_digest(folder)}-{_clip_limit(folder, max_tokens)}"


def _clip_limit(folder: Path, max_tokens: int) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get("text_config") or config  # of the whole CLIP, or of its text model alone
    return min(max_tokens, int(text.get("max_position_embeddings", _CLIP_POSITIONS)))


def _encoder_digest(folder: Path) -> str:
    """Digest of weights, vocabulary and settings, but not of who saved them when."""
    settings = {}
    for file in sorted(folder.glob("*.json")):
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if key not in _BOOKKEEPING}
        settings[file.name] = value
    text = json.dumps(settings, sort_keys=True)
    text += folder_digest(folder, ".safetensors", ".model", ".txt")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(kind: Any, folder: Path, device: str | torch.device) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval().to(device), tokenizer


@contextmanager
def _model_folder(uri: str, kinds: Collection[str]) -> Iterator[tuple[Path, str]]:
    """The model as a local folder, and which of the `kinds` it is."""
    if not exists(join(uri, "config.json")):
        raise UserError(
            f"no text encoder at {uri} (no config.json there); give a folder in Hugging Face "
            'layout, or "tiny" to have a small one built from the captions'
        )
    found = read_json(join(uri, "config.json")).get("model_type")
    if found not in kinds:
        raise UserError(f"{uri} holds a model of type {found!r}; expected one of {list(kinds)}")
    with local_copy(uri) as folder:
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{uri} has no .safetensors weights, and pickled ones are never loaded; where you "
                "trust them, load them with transformers and save_pretrained() them to a new folder"
            )
        yield folder, found
