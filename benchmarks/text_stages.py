"""What is measured on sentences: fine-tuning, BadActs' search for intervals and its judging of a test set.

The sides are the released scripts' way, written plainly (clearloveclearlove/BadActs@7932f19: random batches, padded to
their longest sentence, through PyTorch's own linear layers; the unclamped logits computed anew in every step, gradients
kept for all weights; sentences judged one by one), and ours. The encoder has MiniLM-L6's shape and untrained
weights, the sentences have SST-2's lengths; speed depends on neither.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.stages import SEED, USUAL, Bench, Stage
from defenses import badacts
from reproduce.data.texts import Texts
from reproduce.finetuning import TextRecipe, fine_tune
from reproduce.models.encoder import TextClassifier, hashed_words
from reproduce.models.linear import Linear
from reproduce.rng import derive, generator

EPOCH = replace(badacts.RELEASED, epochs=1, correct_only=False, restarts=0)
TUNING = TextRecipe(epochs=1, rate=1e-4, warmup=0, batch=32, keep_best=False)


def encoder(layers: int, width: int) -> TextClassifier:
    """A BERT with untrained weights, in eval mode."""
    from transformers import BertConfig, BertForSequenceClassification
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        network = BertForSequenceClassification(BertConfig(
            vocab_size=30_522, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32,
            intermediate_size=4 * width, num_labels=2))
    return TextClassifier(network, hashed_words, 0).eval()


def usual(model: TextClassifier) -> TextClassifier:
    """A copy with PyTorch's own linear layers."""
    copy = deepcopy(model)
    for module in copy.modules():
        if isinstance(module, Linear):
            module.__class__ = nn.Linear
    return copy


def sentences(count: int) -> Texts:
    """As long as SST-2's: 19 words on average, 2 to 52."""
    rng = np.random.default_rng(derive(SEED, "sentences"))
    lengths = np.clip(rng.gamma(4.5, 4.3, count).round().astype(int), 2, 52)
    return Texts(tuple(" ".join(f"w{word}" for word in rng.integers(0, 4000, length)) for length in lengths),
                 torch.arange(count) % 2)


def tuning(bench: Bench) -> Iterator[Stage]:
    """One epoch of fine-tuning; a few sentences suffice for the accuracy that ends it."""
    model, texts = encoder(*bench.sizes.encoder), sentences(bench.sizes.sentences)
    plain_model = usual(model)
    tokens = model.encode(texts.texts)
    # One for all windows, which a user's own loop would have too.
    optimizer = torch.optim.AdamW(plain_model.parameters(), TUNING.rate, weight_decay=0.0)

    def plain() -> None:
        plain_model.train()
        order = torch.randperm(len(tokens), generator=generator(SEED, "plain")).tolist()
        for start in range(0, len(order), TUNING.batch):
            index = order[start:start + TUNING.batch]
            loss = F.cross_entropy(plain_model(*plain_model.batch([tokens[i] for i in index])), texts.labels[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(plain_model.parameters(), TUNING.clip)
            optimizer.step()

    def ours() -> None:
        fine_tune(model, texts, texts.take(range(8)), TUNING, SEED, phase="bench")

    yield Stage("fine-tuning a text classifier", len(tokens), {USUAL: plain}, {"fp32": ours}, {}, USUAL)


def search(bench: Bench) -> Iterator[Stage]:
    """One epoch of the search, on as many sentences as a window has images to train on."""
    model, clean = encoder(*bench.sizes.encoder), sentences(bench.sizes.sentences)
    tokens, plain_model = model.encode(clean.texts), usual(model)

    def plain() -> None:
        shape = len(model.layers), model.width
        upper, margin = (torch.ones(shape, requires_grad=True) for _ in range(2))
        optimizer = torch.optim.Adam([upper, margin], lr=EPOCH.rate)
        order = torch.randperm(len(tokens), generator=generator(SEED, "plain")).tolist()
        for start in range(0, len(order), EPOCH.batch):
            batch = plain_model.batch([tokens[i] for i in order[start:start + EPOCH.batch]])
            wanted = plain_model(*batch)
            with plain_model.hooked(badacts.clamp_hook(upper - margin.exp(), upper)):
                error = F.mse_loss(plain_model(*batch), wanted)
            optimizer.zero_grad()
            (error + EPOCH.weight * margin.exp().norm()).backward()
            optimizer.step()

    def ours() -> None:
        with model.frozen():
            badacts.search(model, clean, EPOCH, SEED)

    yield Stage("BadActs: intervals", len(tokens), {USUAL: plain}, {"fp32": ours}, {}, USUAL)


def judging(bench: Bench) -> Iterator[Stage]:
    """Suspicion, plain label and clamped label of every sentence."""
    model, texts = encoder(*bench.sizes.encoder), sentences(bench.sizes.sentences).texts
    plain_model = usual(model)
    lower, upper = badacts._constant((len(model.layers), model.width), EPOCH)
    mu, sigma = badacts.moments(model.first_tokens(texts[:32]))

    def one_by_one() -> Tensor:
        with torch.no_grad():
            found = []
            for text in texts:
                batch = plain_model.batch(plain_model.encode([text]))
                states = plain_model.network(input_ids=batch[0], attention_mask=batch[1],
                                       output_hidden_states=True).hidden_states[1:]
                inside = badacts.nas(torch.stack([layer[:, 0] for layer in states], 1), mu, sigma, EPOCH.deviations)
                with plain_model.hooked(badacts.clamp_hook(lower, upper)):
                    clamped = plain_model(*batch)
                found.append(torch.cat([inside, clamped[0], plain_model(*batch)[0]]))
        return torch.stack(found)

    def ours() -> Tensor:
        tokens = model.encode(texts)
        inside = badacts.nas(model.first_tokens(tokens), mu, sigma, EPOCH.deviations)
        clamped = badacts.clamped_logits(model, tokens, lower, upper, EPOCH)
        return torch.cat([inside[:, None], clamped, model.logits(tokens)], 1)

    # A unit exactly on the edge of mu +- k sigma may fall on either side in another order of sums.
    if not torch.allclose(ours(), one_by_one(), atol=2e-3):
        raise AssertionError("BadActs: our numbers differ from the slow path's")
    yield Stage("BadActs: judging", len(texts), {USUAL: one_by_one}, {"fp32": ours}, {}, USUAL)


TEXT_STAGES: dict[str, Callable[[Bench], Iterator[Stage]]] = {"tuning": tuning, "intervals": search,
                                                                  "judge": judging}
