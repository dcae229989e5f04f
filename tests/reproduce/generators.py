"""Tiny generators of paraphrases with weights by rule, as `save_pretrained` writes them."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ("<unk>", "<pad>", "<bos>", "<eos>")
WORDS = ("the", "film", "is", "warm", "dull", "and", "it", "came", "to", "pass", "behold", "people", "saith", ".")
ROOM = 128      # token numbers, special ones included


def save_style_transfer(place: Path, segments: bool = True) -> Path:
    """A GPT-2; without the segment tokens it is no style transfer."""
    tokenizer = _tokenizer()
    if segments:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<dense-vectors>", "<tokens>", "<verb>"]})
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=ROOM,
                        bos_token_id=2, eos_token_id=3, tie_word_embeddings=False)
    return _save(GPT2LMHeadModel(config), tokenizer, place)


def save_seq2seq(place: Path) -> Path:
    """A T5."""
    tokenizer = _tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      decoder_start_token_id=1, pad_token_id=1, eos_token_id=3)
    return _save(T5ForConditionalGeneration(config), tokenizer, place)


def save_willful(place: Path, positions: int = ROOM) -> Path:
    """A BART that asks `generate` for beams, penalties and an end of its own, as published ones do."""
    tokenizer = _tokenizer()
    config = BartConfig(vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, decoder_ffn_dim=32,
                        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, pad_token_id=1,
                        bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
                        max_position_embeddings=positions)
    network = BartForConditionalGeneration(config)
    network.generation_config.update(num_beams=4, no_repeat_ngram_size=2, repetition_penalty=3.0, min_length=8,
                                     forced_eos_token_id=3, early_stopping=True)
    return _save(network, tokenizer, place)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>",
                                   eos_token="<eos>")


def _save(network: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, place: Path) -> Path:
    """With weights that no version of torch or transformers draws otherwise."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for name, weight in sorted(network.named_parameters()):
            drawn = torch.from_numpy(rng.normal(0, 0.4, tuple(weight.shape)))
            weight.copy_(1 + 0.1 * drawn if name.endswith("norm.weight") or ".ln_" in name else drawn)
    network.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place
