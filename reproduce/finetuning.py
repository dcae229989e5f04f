"""Fine-tuning a text classifier: AdamW, linear schedule with warm-up, gradients clipped.

Order and dropout of epoch e depend on (seed, phase, e) only, so an interrupted training resumes at an epoch and ends
bit for bit where the undisturbed one ends (on a CPU).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce.data.texts import Texts
from reproduce.models.encoder import TextClassifier, Tokens, by_length
from reproduce.rng import derive, generator
from reproduce.training import Checkpoint, Observer, check_finite, flat_state, restore, silent

PART = 8    # sentences of a batch that go through the model together on a CPU
NARROW = 128    # hidden units: in fewer, padding costs less than more calls


@dataclass(frozen=True)
class TextRecipe:
    """The rate rises from 0 over `warmup` epochs to `rate` and falls to 0 at the end, step by step.

    keep_best: the model is that of the epoch with the best accuracy on the validation set, the first of equals;
    otherwise the last epoch's.
    precision: "fp32", or "bf16" for autocast.
    epsilon: AdamW's.
    """

    epochs: int
    rate: float
    warmup: float
    batch: int
    weight_decay: float = 0.0
    clip: float = 1.0
    keep_best: bool = True
    precision: str = "fp32"
    epsilon: float = field(default=1e-8, metadata={"since": "badacts"})

    def rate_at(self, step: int, per_epoch: int) -> float:
        """Learning rate of the optimisation step number `step`, counted from 0."""
        rising, total = self.warmup * per_epoch, self.epochs * per_epoch
        if step < rising:
            return self.rate * step / rising
        return self.rate * (total - step) / (total - rising)


def fine_tune(model: TextClassifier, train: Texts, validation: Texts, recipe: TextRecipe, seed: int, *, phase: str,
              observe: Observer = silent, checkpoint: Checkpoint | None = None) -> list[dict[str, float]]:
    """Train `model` in place on `train`, leave it in eval mode, and return one row of numbers per epoch.

    validation is clean data, used for choosing the epoch only. phase names the random streams.
    """
    tokens, labels = model.encode(train.texts), train.labels.to(model.device)
    held = model.encode(validation.texts)
    optimizer = torch.optim.AdamW(model.network.parameters(), lr=recipe.rate, weight_decay=recipe.weight_decay,
                                  eps=recipe.epsilon, fused=True)  # a step on a CPU takes a tenth of the time
    history: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    saved = checkpoint.load() if checkpoint else None
    if saved:
        tensors = dict(saved[1])
        best = {name[5:]: tensors.pop(name) for name in list(tensors) if name.startswith("best.")}
        restore(model.network, [optimizer], tensors)
        history = saved[2]
    for epoch in range(len(history), recipe.epochs):
        row = _epoch(model, tokens, labels, recipe, optimizer, seed, phase, epoch)
        check_finite(row, phase, epoch + 1)
        model.eval()
        right = model.logits(held).argmax(1) == validation.labels
        row["validation_acc"] = 100 * float(right.float().mean())
        # The released trainer starts from 0 and takes a strictly better epoch only.
        if row["validation_acc"] > max((r["validation_acc"] for r in history), default=-1.0) and recipe.keep_best:
            best = {name: value.detach().cpu().clone() for name, value in model.network.state_dict().items()}
        history.append({"epoch": epoch + 1, **row})
        if checkpoint:
            kept = {f"best.{name}": value for name, value in best.items()}
            checkpoint.save(epoch + 1, flat_state(model.network, [optimizer]) | kept, history)
        observe(phase, epoch + 1, recipe.epochs, model, history[-1])
    if recipe.keep_best:
        model.network.load_state_dict(best)
    model.eval()
    return history


def _epoch(model: TextClassifier, tokens: Tokens, labels: Tensor, recipe: TextRecipe,
           optimizer: torch.optim.Optimizer, seed: int, phase: str, epoch: int) -> dict[str, float]:
    """One pass over the data: mean loss and training accuracy (percent)."""
    model.train()
    words = model.network.get_input_embeddings()
    # The words of one part are few: on a CPU its gradient is kept by words, and made one of all words once a batch.
    words.sparse = model.device.type == "cpu"
    count = len(tokens)
    order = torch.randperm(count, generator=generator(seed, "order", phase, epoch)).tolist()
    starts = range(0, count, recipe.batch)
    loss_sum = correct = 0.0
    # Dropout draws from the global generator.
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "dropout", phase, epoch))
        for number, start in enumerate(starts):
            index = order[start:start + recipe.batch]
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(epoch * len(starts) + number, len(starts))
            optimizer.zero_grad()
            for part in _parts(index, tokens, model):
                with torch.autocast(model.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
                    logits = model(*model.batch([tokens[i] for i in part]))
                loss = F.cross_entropy(logits.float(), labels[part], reduction="sum")
                (loss / len(index)).backward()
                loss_sum += loss.item()
                correct += float((logits.argmax(1) == labels[part]).sum())
            if words.sparse:
                words.weight.grad = words.weight.grad.to_dense()
            nn.utils.clip_grad_norm_(model.network.parameters(), recipe.clip)
            optimizer.step()
    words.sparse = False
    return {"rate": recipe.rate_at((epoch + 1) * len(starts) - 1, len(starts)), "loss": loss_sum / count,
            "train_acc": 100 * correct / count}


def _parts(index: list[int], tokens: Tokens, model: TextClassifier) -> list[list[int]]:
    """A batch in parts of similar length on a CPU, which saves it the padding; their gradients add up to the batch's.

    On a GPU, bound by launches rather than by padding, and of a narrow model the batch as it is.
    """
    whole = model.device.type != "cpu" or model.network.config.hidden_size < NARROW
    rows = len(index) if whole else PART
    return [[index[i] for i in part] for part in by_length([tokens[i] for i in index], rows)]
