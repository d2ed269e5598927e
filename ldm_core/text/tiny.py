"""Small text encoders for a machine without downloads: the real classes, seeded weights.

A word-level tokenizer is trained on the captions, and a T5 encoder and a CLIP text model are saved
in the Hugging Face layout, so that what reads them is the code that reads the published ones.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ldm_core.files import upload_folder

PAD, END, UNKNOWN, START = "<pad>", "</s>", "<unk>", "<s>"


def build_tiny_text_encoders(
    captions: Iterable[str], t5_uri: str, clip_uri: str, width: int = 64, seed: int = 0
) -> None:
    """Write a tiny T5 encoder and a tiny CLIP text model to two folders or URIs.

    Args:
        captions: the tokenizer's vocabulary is theirs, most frequent words first.
        t5_uri: where the T5 encoder goes.
        clip_uri: where the CLIP text model goes.
        width: of the embeddings, a multiple of 4.
        seed: of the weights; same captions and seed, same bytes.
    """
    texts = sorted(set(captions))
    with torch.random.fork_rng():  # transformers initialises from the global generator
        torch.manual_seed(seed)
        _save(_t5(width, _tokenizer(texts, start=False)), t5_uri)
        _save(_clip(width, _tokenizer(texts, start=True)), clip_uri)


def _tokenizer(captions: list[str], start: bool) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        special_tokens=[PAD, END, UNKNOWN, START], vocab_size=8192, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    template = f"{START} $A {END}" if start else f"$A {END}"
    ids = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, bos_token=START
    )


def _t5(width: int, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config), tokenizer


def _clip(width: int, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config), tokenizer


def _save(model_and_tokenizer: tuple[Any, Any], uri: str) -> None:
    model, tokenizer = model_and_tokenizer
    with tempfile.TemporaryDirectory(prefix="ldm-text-") as folder:
        model.save_pretrained(Path(folder))
        tokenizer.save_pretrained(Path(folder))
        upload_folder(folder, uri)
