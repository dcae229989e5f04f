"""BadActs: a universal backdoor defense in the activation space (Yi et al., Findings of ACL 2024, arXiv:2405.11227).

Purification. Every unit i of every encoder layer gets an interval, and activations are clamped into it, layer after
layer, for all tokens:

    a_i <- max(min(a_i, u_i), l_i),   l_i = u_i - exp(m_i)

u and m are optimised on clean sentences so that the logits stay and the intervals become narrow:

    minimise   MSE(f_clamped(x), f(x)) + c ||exp(m)||_F

c rises by the factor a whenever the clamped model still classifies at least `keep` of the sentences as before, and
falls by it otherwise; if the search ends below `floor`, c is halved and it starts anew.

Detection. mu_i and sigma_i of the [CLS] activations after each layer are estimated on half of the clean sentences:

    NAS(x) = mean_i 1[ mu_i - k sigma_i <= a_i(x) <= mu_i + k sigma_i ]

Few activations inside mean poisoned. Suspicion is 1 - NAS here, as in the paper's Figure 2; the released code keeps
NAS and calls low values poisoned. The threshold is the suspicion that the share `frr` of the other half exceeds.
Detection then purification classifies flagged sentences with the clamped model and the others with the plain one.

Constants: clearloveclearlove/BadActs@7932f19, P = BadActs_purification.py, T = BadActs_detection_then_purification.py,
D = openbackdoor/defenders/badacts_defender.py.

Variants. The paper's body was not readable to us: abstract, the caption of Figure 2 and the formula of NAS were.
`described` starts the search from what the caption estimates first, [mu - k sigma, mu + k sigma] of the same
activations over all clean tokens, and uses all clean sentences; `released` starts from the same constants for every
unit, which have nothing to do with the data, and keeps the sentences that the victim classifies correctly.

Controls: `statistics`, the intervals mu +- k sigma as they are; `initial`, the constants as they are; `random`, the
optimised intervals dealt out anew to the units of a layer, so that the total width is the same; `cls`, the optimised
intervals applied to [CLS] alone, where detection looks, and not to all tokens, as the released code does.

Departures. Batches hold sentences of similar length (a random part of the data, sorted), which saves padding; the
unclamped logits are computed once; restarts are capped, and reported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reproduce.data.texts import Texts
from reproduce.defending import Guard, Judged, TrainingData, false_rejection_threshold, halves, judged
from reproduce.models.encoder import TextClassifier, Tokens, by_length
from reproduce.rng import generator
from reproduce.training import Observer, silent

MODALITY = "text"
CHUNK = 8   # batches whose sentences are sorted by length together


@dataclass(frozen=True)
class Config:
    """mode: "purify", "detect" or "detect-then-purify". intervals: "optimised", "statistics", "initial", "random".

    layers: (first, last) layer clamped, counted from 0; None for all. tokens: "all" or "cls".
    """

    mode: str = "purify"
    intervals: str = "optimised"
    tokens: str = "all"
    layers: tuple[int, int] | None = None
    start: str = "constant"  # P:124-125; "statistics" in `described`
    correct_only: bool = True  # P:97-114
    upper: float = 1.0  # P:124, u before the search
    margin: float = 1.0  # P:125, m before the search
    rate: float = 0.01  # P:171, Adam
    batch: int = 32  # P:163
    epochs: int = field(default=50, metadata={"smoke": 10})  # P:174
    weight: float = 0.1  # P:203, c
    factor: float = 1.2  # P:204, a
    first: int = 15  # P:193: epoch > 10 and epoch % 5 == 0
    every: int = 5  # P:193
    keep: float = 98.0  # P:194, percent, with dev_acc = 100 (P:117)
    floor: float = 97.0  # P:206, percent
    restarts: int = 5  # ours; the released loop has no end
    deviations: float = 3.0  # k: T:191 (D:117 has 2, which no script uses)
    frr: float = 0.05  # D:114; T:190 has 0.2


RELEASED = Config()
DESCRIBED = replace(RELEASED, start="statistics", correct_only=False)
THEN_PURIFY_FRR = 0.2   # T:190
SETTINGS = {
    ("badacts", "released"): RELEASED,
    ("badacts", "described"): DESCRIBED,
    ("badacts", "detect"): replace(RELEASED, mode="detect"),
    ("badacts", "detect-then-purify"): replace(RELEASED, mode="detect-then-purify", frr=THEN_PURIFY_FRR),
    ("badacts", "statistics"): replace(RELEASED, intervals="statistics"),
    ("badacts", "initial"): replace(RELEASED, intervals="initial"),
    ("badacts", "random"): replace(RELEASED, intervals="random"),
    ("badacts", "cls"): replace(RELEASED, tokens="cls"),
}


def requires(config: Config) -> frozenset[str]:
    return frozenset()


def searched(config: Config) -> bool:
    """Whether these settings need the optimised intervals at all."""
    return config.mode != "detect" and config.intervals in ("optimised", "random")


def builds_on(config: Config) -> tuple[str, Config] | None:
    """The settings whose intervals these reuse: the plain search, shared by everything that only applies it."""
    if not searched(config):
        return None
    plain = Config(start=config.start, correct_only=config.correct_only, upper=config.upper, margin=config.margin,
                   rate=config.rate, batch=config.batch, epochs=config.epochs, weight=config.weight,
                   factor=config.factor, first=config.first, every=config.every, keep=config.keep, floor=config.floor,
                   restarts=config.restarts, deviations=config.deviations if config.start == "statistics" else 3.0)
    return None if plain == config else ("badacts", plain)


def work(config: Config, count: int, classes: int) -> float:
    """Sentences forwards and backwards, for estimates of time."""
    return config.epochs * count if searched(config) and builds_on(config) is None else 0


def defend(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer = silent,
           base: dict[str, Tensor] | None = None, training: TrainingData | None = None) -> Guard:
    """A guard around `model`. base: the tensors of the run that `builds_on` names, its search not repeated."""
    tensors: dict[str, Tensor] = {}
    info: dict[str, Any] = {}
    hook = None
    if config.mode != "detect":
        with model.frozen():
            lower, upper, info = _intervals(model, clean, config, seed, observe, base)
        tensors = {"lower": lower, "upper": upper}
        hook = clamp_hook(lower.to(model.device), upper.to(model.device), config.tokens, config.layers)
    if config.mode == "purify":
        return Guard(lambda texts: Judged(clamped_logits(model, model.encode(texts), lower, upper, config).argmax(1)),
                     hook=hook, info=info, tensors=tensors)

    fitted, held = halves(clean, seed, "badacts-halves")
    mu, sigma = moments(model.first_tokens(fitted.texts))
    held_out = 1 - nas(model.first_tokens(held.texts), mu, sigma, config.deviations)
    threshold = false_rejection_threshold(held_out, config.frr)

    def judge(texts: Sequence[str]) -> Judged:
        tokens = model.encode(texts)
        suspicion = 1 - nas(model.first_tokens(tokens), mu, sigma, config.deviations)
        plain = model.logits(tokens).argmax(1)
        if config.mode == "detect":
            return judged(plain, suspicion, threshold)
        return judged(plain, suspicion, threshold, clamped_logits(model, tokens, lower, upper, config).argmax(1))

    return Guard(judge, threshold=threshold, held_out=held_out, hook=hook, info=info,
                 tensors={**tensors, "mu": mu, "sigma": sigma})


def moments(activations: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over the first dimension: (N, ...) -> (...), (...)."""
    wide = activations.double()
    return wide.mean(0).float(), wide.std(0, correction=0).float()


def nas(activations: Tensor, mu: Tensor, sigma: Tensor, deviations: float) -> Tensor:
    """Share of the units within mu +- deviations * sigma: (N, layers, D) -> (N,) in [0, 1]."""
    inside = ((activations - mu).abs() <= deviations * sigma).float()
    return inside.mean((1, 2))


def clamp_hook(lower: Tensor, upper: Tensor, tokens: str = "all", layers: tuple[int, int] | None = None) -> Any:
    """A hook for `TextClassifier.hooked` that clamps each layer's output (N, L, D) into (layers, D) intervals."""
    first, last = layers or (0, len(lower) - 1)

    def hook(layer: int, states: Tensor) -> Tensor | None:
        if not first <= layer <= last:
            return None
        # min first, then max, and both on tensors: gradients flow to the bounds of what is clamped.
        if tokens == "cls":
            cls = torch.maximum(torch.minimum(states[:, :1], upper[layer]), lower[layer])
            return torch.cat([cls, states[:, 1:]], 1)
        return torch.maximum(torch.minimum(states, upper[layer]), lower[layer])

    return hook


def clamped_logits(model: TextClassifier, tokens: Tokens, lower: Tensor, upper: Tensor, config: Config) -> Tensor:
    """Logits (N, K) on the CPU with activations clamped into the intervals (layers, D)."""
    place = model.device
    with model.hooked(clamp_hook(lower.to(place), upper.to(place), config.tokens, config.layers)):
        return model.logits(tokens)


def _intervals(model: TextClassifier, clean: Texts, config: Config, seed: int, observe: Observer,
               base: dict[str, Tensor] | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(lower, upper), both (layers, D) on the CPU, and what to report."""
    shape = len(model.layers), model.width
    if config.intervals == "initial":
        lower, upper, info = *_constant(shape, config), {}
    elif config.intervals == "statistics":
        lower, upper = token_statistics(model, clean, config.deviations)
        info = {}
    else:
        if base is None:
            lower, upper, info = search(model, clean, config, seed, observe)
        else:
            lower, upper, info = base["lower"], base["upper"], {}
        if config.intervals == "random":
            lower, upper = _dealt_anew(lower, upper, seed)
    return lower, upper, info | {"width": float((upper - lower).mean())}


def _constant(shape: tuple[int, int], config: Config) -> tuple[Tensor, Tensor]:
    upper = torch.full(shape, config.upper)
    return upper - math.exp(config.margin), upper


def _dealt_anew(lower: Tensor, upper: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The intervals of each layer in a random order of its units."""
    orders = [torch.randperm(lower.shape[1], generator=generator(seed, "badacts-random", layer))
              for layer in range(len(lower))]
    return tuple(torch.stack([row[order] for row, order in zip(bounds, orders, strict=True)])  # type: ignore[return-value]
                 for bounds in (lower, upper))


@torch.inference_mode()
def token_statistics(model: TextClassifier, clean: Texts, deviations: float) -> tuple[Tensor, Tensor]:
    """mu -+ deviations * sigma of each unit over all tokens of the clean sentences: two (layers, D)."""
    tokens = model.encode(clean.texts)
    sums = torch.zeros(2, len(model.layers), model.width, dtype=torch.float64)
    count = 0
    for index in by_length(tokens, 64):
        numbers, mask = model.batch([tokens[i] for i in index])

        def add(layer: int, states: Tensor, mask: Tensor = mask) -> None:
            real = states[mask.bool()].double().cpu()
            sums[0, layer] += real.sum(0)
            sums[1, layer] += real.square().sum(0)

        with model.hooked(add):
            model(numbers, mask)
        count += int(mask.sum())
    mu = sums[0] / count
    sigma = (sums[1] / count - mu.square()).clamp(min=0).sqrt()
    return (mu - deviations * sigma).float(), (mu + deviations * sigma).float()


def search(model: TextClassifier, clean: Texts, config: Config, seed: int,
           observe: Observer = silent) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The optimised intervals (lower, upper), both (layers, D) on the CPU, and what the search reports."""
    tokens = model.encode(clean.texts)
    logits = model.logits(tokens)
    predicted = logits.argmax(1)
    if config.correct_only:
        right = (predicted == clean.labels).nonzero().flatten().tolist()
        tokens, logits, wanted = [tokens[i] for i in right], logits[right], clean.labels[right]
    else:
        wanted = predicted
    shape = len(model.layers), model.width
    start = token_statistics(model, clean, config.deviations) if config.start == "statistics" \
        else _constant(shape, config)
    for attempt in range(config.restarts + 1):
        weight = config.weight / 2 ** attempt
        lower, upper, reached = _attempt(model, tokens, logits, wanted, start, weight, config, seed, attempt, observe)
        if reached >= config.floor:
            break
    return lower, upper, {"sentences": len(tokens), "restarts": attempt, "kept": reached, "first_weight": weight}


def _attempt(model: TextClassifier, tokens: Tokens, logits: Tensor, wanted: Tensor, start: tuple[Tensor, Tensor],
             weight: float, config: Config, seed: int, attempt: int,
             observe: Observer) -> tuple[Tensor, Tensor, float]:
    """One search from `start` with first weight `weight`: bounds and the percentage classified as `wanted`."""
    place = model.device
    upper = start[1].to(place).clone().requires_grad_()
    # A unit that never moves has no width; exp(-20) stands for it.
    margin = (start[1] - start[0]).log().clamp(min=-20.0).to(place).clone().requires_grad_()
    optimizer = torch.optim.Adam([upper, margin], lr=config.rate)
    reference = logits.to(place)
    phase = f"intervals {attempt + 1}"
    kept = 0.0
    for epoch in range(config.epochs):
        sums = torch.zeros(2)
        for index in batches(tokens, config.batch, seed, phase, epoch):
            lower = upper - margin.exp()
            with model.hooked(clamp_hook(lower, upper)):
                error = F.mse_loss(model(*model.batch([tokens[i] for i in index])), reference[index])
            width = margin.exp().norm()
            optimizer.zero_grad()
            (error + weight * width).backward()
            optimizer.step()
            sums += torch.tensor([error.item(), width.item()]) * len(index)
        row = {"epoch": epoch + 1, "mse": float(sums[0]) / len(tokens), "width": float(sums[1]) / len(tokens),
               "weight": weight}
        scheduled = epoch >= config.first and epoch % config.every == 0
        if scheduled or epoch == config.epochs - 1:
            bounds = (upper - margin.exp()).detach().cpu(), upper.detach().cpu()
            found = clamped_logits(model, tokens, *bounds, Config()).argmax(1)
            kept = row["kept"] = 100 * float((found == wanted).float().mean())
            if scheduled:
                weight = weight * config.factor if kept >= config.keep else weight / config.factor
        observe(phase, epoch + 1, config.epochs, model, row)
    return (upper - margin.exp()).detach().cpu(), upper.detach().cpu(), kept


def batches(tokens: Tokens, rows: int, seed: int, phase: str, epoch: int) -> list[list[int]]:
    """Every sentence once, in batches of similar length: random chunks, each sorted and cut, then shuffled."""
    rng = generator(seed, "order", phase, epoch)
    order = torch.randperm(len(tokens), generator=rng).tolist()
    found: list[list[int]] = []
    for start in range(0, len(order), rows * CHUNK):
        chunk = sorted(order[start:start + rows * CHUNK], key=lambda i: len(tokens[i]))
        found += [chunk[i:i + rows] for i in range(0, len(chunk), rows)]
    return [found[i] for i in torch.randperm(len(found), generator=rng).tolist()]
