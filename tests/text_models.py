"""Text models of other families than T5 and CLIP: random weights, in the hub's layout."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BartConfig,
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    SiglipConfig,
    ViTConfig,
)

WIDTH = 16
CAPTIONS = ["a red cat", "a dog", "", "two blue cats and a very large red dog on white"]
_WORDS = ["<pad>", "<s>", "</s>", "<unk>", *sorted(set(" ".join(CAPTIONS).split()))]

_DEEP = {
    "vocab_size": len(_WORDS), "hidden_size": WIDTH, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = {**_DEEP, "num_key_value_heads": 1, "head_dim": 8}
_VISION = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
_BART = {
    "vocab_size": len(_WORDS), "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip


def config_of(kind: str, **changes: Any) -> Any:
    """A tiny model's settings."""
    # ModernBERT has one attention of three to all, and Gemma alternates: windows shorter than texts
    local = {"global_attn_every_n_layers": 2, "local_attention": 4}
    special = {"cls_token_id": 1, "sep_token_id": 2}
    window = {"sliding_window": 4}
    kinds = {
        "bert": lambda: BertConfig(**_DEEP | changes),
        "modernbert": lambda: ModernBertConfig(**_DEEP | local | special | changes),
        "llama": lambda: LlamaConfig(**_DECODER | changes),
        "qwen2": lambda: Qwen2Config(**_DECODER | {"vocab_size": 260} | changes),
        "gemma2": lambda: Gemma2Config(**_DECODER | window | changes),
        "bart": lambda: BartConfig(**_BART | changes),
        "siglip": lambda: SiglipConfig(
            text_config={**_DEEP, "projection_size": WIDTH}, vision_config=_VISION
        ),
        "gemma3": lambda: Gemma3Config(
            text_config={**_DECODER, **window},
            vision_config={"model_type": "siglip_vision_model", **_VISION},
            mm_tokens_per_image=4,
        ),
        "vit": lambda: ViTConfig(**_VISION),
    }
    return kinds[kind]()


def tokenizer_of(start: bool = True, end: bool = True, **settings: Any) -> PreTrainedTokenizerFast:
    """Words, between the tokens for start and end if these are asked for."""
    tokenizer = Tokenizer(
        models.WordLevel({word: id for id, word in enumerate(_WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single = " ".join([*["<s>"] * start, "$A", *["</s>"] * end])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **settings)


def bytes_of_qwen() -> Qwen2Tokenizer:
    """Qwen's kind, which makes no token of nothing; here a token is a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer(vocab={letter: id for id, letter in enumerate(letters)}, merges=[])


def text_model(folder: Path, kind: str, tokenizer: Any = None, **changes: Any) -> Path:
    """Save a model and, if there is none of another kind, a tokenizer that has everything."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModel.from_config(config_of(kind, **changes))
        for name, weight in model.named_parameters():
            if weight.dim() > 1:  # norms stay; contexts are to tell
                weight.data.normal_(std=0.1 if "embed" in name else 0.3)
    model.save_pretrained(folder)
    if tokenizer is None:
        words = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = bytes_of_qwen() if kind == "qwen2" else tokenizer_of(**words)
    tokenizer.save_pretrained(folder)
    return folder


def hidden_states(
    model: Any, tokenizer: Any, captions: Sequence[str] = CAPTIONS
) -> list[torch.Tensor]:
    """The last hidden states, (L, D), of captions that are computed one by one, unpadded."""
    with torch.no_grad():
        return [
            model.eval()(input_ids=torch.tensor([tokenizer(caption)["input_ids"]]))
            .last_hidden_state[0]
            .float()
            for caption in captions
        ]
