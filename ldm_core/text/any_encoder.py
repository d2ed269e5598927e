"""Token embeddings by any text model of transformers: BERT's kind, Gemma's, Qwen's, Llama's.

What is taken is the last hidden state, of decoder-only models as it is after their final norm, as
Sana takes Gemma's (https://arxiv.org/abs/2410.10629). Of a model with other parts (a decoder that
writes, a tower that sees) only the part that reads text is kept.
Shapes: B captions, L tokens of the longest, D token width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_core.errors import UserError
from ldm_core.text.encoders import TextEmbedding, TextEncoder, TextFacts
from ldm_core.text.folders import encoder_digest, first_line, model_folder, read_tokenizer

_TAKES = {"input_ids", "attention_mask"}
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)


def load_any(
    uri: str,
    max_tokens: int = 128,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> TextEncoder:
    """A text model that `AutoModel` knows; gives token embeddings.

    Captions are cut at the model's own number of positions if `max_tokens` is more. A caption of
    which the tokenizer makes no token at all, as Qwen's does of the empty one, is embedded as the
    single token that begins a text, or ends it where none begins it.

    Args:
        uri: of a folder in Hugging Face layout.
        max_tokens: captions are cut here.
        device: to compute on.
        dtype: to compute in; None is what the weights are stored in.

    Raises:
        UserError: nothing there, no text model, one that only code in the folder could make,
            pickled weights, weights that are not all there, or no tokenizer.
    """
    with model_folder(uri) as (folder, _):
        files = _Files.read(folder, uri)
        model, facts = files.model(dtype).to(device), files.facts(max_tokens, dtype)
    embed = partial(_embedded, model, files.tokenizer, facts.max_tokens, torch.device(device))
    return TextEncoder("t5", facts.digest, facts.width, facts.max_tokens, embed)


def describe_any(uri: str, max_tokens: int = 128, dtype: torch.dtype | None = None) -> TextFacts:
    """What `load_any` would load, from the files alone; raises as it does, but for weights."""
    with model_folder(uri) as (folder, _):
        return _Files.read(folder, uri).facts(max_tokens, dtype)


@dataclass(frozen=True)
class _Files:
    """A folder whose settings and tokenizer are read.

    Attributes:
        folder, uri: where it is, and what the user calls it.
        config: of the whole model.
        tokenizer: of transformers.
    """

    folder: Path
    uri: str
    config: Any
    tokenizer: Any

    @classmethod
    def read(cls, folder: Path, uri: str) -> "_Files":
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except _UNREADABLE as error:
            raise _no_text_model(uri, error) from error
        config.get_text_config().use_cache = False  # keys and values nobody would ask for
        tokenizer = read_tokenizer(folder, uri)
        tokenizer.truncation_side = "right"
        return cls(folder, uri, config, tokenizer)

    def model(self, dtype: torch.dtype | None) -> Any:
        """The part that reads text, with its weights, in evaluation mode."""
        from transformers import AutoModel

        try:
            whole, told = AutoModel.from_pretrained(
                self.folder,
                config=self.config,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except _UNREADABLE as error:
            raise _no_text_model(self.uri, error) from error
        part = self._reader_of(whole)
        self._check_weights(whole, part, told["missing_keys"])
        return part.eval()

    def facts(self, max_tokens: int, dtype: torch.dtype | None) -> TextFacts:
        """From a model without weights, which is made in no time."""
        from transformers import AutoModel

        try:
            with torch.device("meta"):
                whole = AutoModel.from_config(self.config, trust_remote_code=False)
        except _UNREADABLE as error:
            raise _no_text_model(self.uri, error) from error
        config = self._reader_of(whole).config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or max_tokens
        limits = (max_tokens, positions, self.tokenizer.model_max_length)
        limit = min(int(each) for each in limits if each > 0)
        digest = encoder_digest(self.folder, limit, dtype)
        return TextFacts(digest, int(config.hidden_size), limit)

    def _reader_of(self, whole: Any) -> Any:
        """The part of a model that takes tokens and gives hidden states."""
        encodes = whole.config.is_encoder_decoder
        part = whole.get_encoder() if encodes else whole.get_decoder()
        part = getattr(part, "base_model", part)  # without a head, where it has one
        if not set(inspect.signature(part.forward).parameters) >= _TAKES:
            raise _no_text_model(
                self.uri, TypeError(f"{type(part).__name__} takes no tokens with a mask")
            )
        return part

    def _check_weights(self, whole: Any, part: Any, missing: Sequence[str]) -> None:
        """Transformers would fill in random ones; a pooler's are not used."""
        used = {id(weight) for name, weight in part.named_parameters() if "pooler" not in name}
        lacking = [name for name, weight in whole.named_parameters() if id(weight) in used]
        lacking = sorted(set(lacking) & set(missing))
        if lacking:
            raise UserError(
                f"{self.uri} lacks {len(lacking)} weights of the model that its config.json "
                f"describes, the first is {lacking[0]}: copy the folder again as a whole"
            )


def _embedded(
    model: Any, tokenizer: Any, max_tokens: int, device: torch.device, captions: list[str]
) -> list[TextEmbedding]:
    """The captions of a batch, padded on the right while they are computed."""
    ids, mask = _padded(tokenizer, max_tokens, captions)
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device), return_dict=True)
    tokens, lengths = out.last_hidden_state.float().cpu(), mask.sum(dim=1).tolist()
    return [TextEmbedding(row[:length], None) for row, length in zip(tokens, lengths, strict=True)]


def _padded(tokenizer: Any, max_tokens: int, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, L), int64: decoder-only models' own tokenizers pad on the left, or not
    at all."""
    found = tokenizer(captions, truncation=True, max_length=max_tokens)["input_ids"]
    alone = _first_of(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    filler = _first_of(tokenizer.pad_token_id, tokenizer.eos_token_id)
    rows = [list(ids) or [alone] for ids in found]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [filler] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def _first_of(*ids: int | None) -> int:
    return next((id for id in ids if id is not None), 0)


def _no_text_model(uri: str, error: Exception) -> UserError:
    return UserError(
        f"{uri} holds no text model that transformers can make without code of the folder's own "
        f"({first_line(error)}): give the folder of a text encoder, such as T5, CLIP's text model, "
        "BERT, Gemma, Qwen or Llama"
    )
