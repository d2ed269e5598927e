"""Text encoders as they lie in folders: what is there, its digest, its tokenizer."""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm_core.errors import UserError
from ldm_core.files import exists, folder_digest, join, local_copy, read_json

_BOOKKEEPING = {"transformers_version", "_name_or_path", "is_local", "local_files_only"}
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "merges.txt")  # one of these is any tokenizer's


def model_type(uri: str) -> str | None:
    """What its config.json says it is, e.g. "t5".

    Raises:
        UserError: nothing there.
    """
    if not exists(join(uri, "config.json")):
        raise UserError(
            f"no text encoder at {uri} (no config.json there); give a folder in Hugging Face "
            'layout, or "tiny" to have a small one built from the captions'
        )
    found = read_json(join(uri, "config.json")).get("model_type")
    return found if isinstance(found, str) else None


@contextmanager
def model_folder(uri: str, kinds: Collection[str] = ()) -> Iterator[tuple[Path, str]]:
    """The model as a local folder, and its type, which is one of the `kinds` if there are any.

    Raises:
        UserError: nothing there, another kind of model, pickled weights, or no tokenizer.
    """
    found = model_type(uri)
    if kinds and found not in kinds:
        raise UserError(f"{uri} holds a model of type {found!r}; expected one of {list(kinds)}")
    with local_copy(uri) as folder:
        if not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{uri} has no .safetensors weights, and pickled ones are never loaded; where you "
                "trust them, load them with transformers and save_pretrained() them to a new folder"
            )
        if not any(any(folder.glob(name)) for name in _TOKENIZERS):
            raise UserError(
                f"{uri} has no tokenizer beside its weights: copy its files there (of a diffusers "
                "pipeline those of its folder tokenizer/), or save_pretrained() one with "
                "transformers"
            )
        yield folder, found or ""


def read_tokenizer(folder: Path, uri: str) -> Any:
    """The tokenizer of a folder; code that lies in the folder is never run.

    Raises:
        UserError: transformers cannot make one of what is there.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(
            f"{uri} has a tokenizer that transformers cannot read ({first_line(error)}): copy its "
            "files again, or save_pretrained() it with transformers"
        ) from error


def encoder_digest(folder: Path, max_tokens: int, dtype: torch.dtype | None = None) -> str:
    """Digest of weights, vocabulary and settings, but not of who saved them when; and of the token
    limit and the dtype, if one is asked for."""
    settings = {}
    for file in sorted(folder.glob("*.json")):
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if key not in _BOOKKEEPING}
        settings[file.name] = value
    text = json.dumps(settings, sort_keys=True)
    text += folder_digest(folder, ".safetensors", ".model", ".txt", ".tiktoken")
    asked = f"-{str(dtype).removeprefix('torch.')}" if dtype else ""
    return f"{hashlib.sha256(text.encode()).hexdigest()[:16]}-{max_tokens}{asked}"


def digest_of(digests: Sequence[str]) -> str:
    """Of several encoders that are used as one; of one, its own."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def first_line(error: Exception) -> str:
    """Of what another library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
