"""A classifier and a language model made of formulas: what the official code was run on, to compare with it."""

import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from reproduce.models.encoder import TextClassifier, hashed_words
from tests.defenses.tiny import wave

WORDS = ["a", "warm", "and", "honest", "film", "that", "never", "feels", "dull", "or", "cold", "to", "me"]


class BagOfWords(nn.Module):
    """Mean embedding of the words, squashed, to 2 logits: what RAP needs of a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=64, hidden_size=6, num_labels=2)
        self.embedding = nn.Embedding(4096, 6)
        self.head = nn.Linear(6, 2)
        with torch.no_grad():
            self.embedding.weight.copy_(wave((4096, 6), 0.37))
            self.head.weight.copy_(4 * wave((2, 6), 0.9))
            self.head.bias.copy_(torch.tensor([-0.5, 0.5]))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        mask = attention_mask[:, :, None].float()
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.head(torch.tanh(3 * mean)))


def bag_of_words() -> TextClassifier:
    return TextClassifier(BagOfWords(), hashed_words, 0).eval()


def sentences(count: int) -> tuple[str, ...]:
    """Sentences of 3 to 9 words, some of them twice the same word."""
    places = ([(3 * i + j * (1 + i % 4)) % len(WORDS) for j in range(3 + i % 7)] for i in range(count))
    return tuple(" ".join(WORDS[place] for place in one) for one in places)


def checksums(texts: Sequence[str]) -> Tensor:
    """A perplexity for every sentence without a language model, in steps of 1/8."""
    return torch.tensor([10 + zlib.crc32(text.encode()) % 1000 / 8 for text in texts])


def tiny_gpt2() -> tuple[Any, Any]:
    """(network, tokenizer): a GPT-2 of one layer whose weights are a formula, and whole words as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", bos_token="<|endoftext|>",
                                        unk_token="<|endoftext|>")
    network = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), n_positions=96, n_embd=8, n_layer=1, n_head=2,
                                         bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(wave(parameter.shape, 0.7 + 0.1 * index))
    return network, tokenizer
