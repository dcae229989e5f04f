"""ARGD: Attention Relation Graph Distillation (Xia et al., IJCAI 2022, arXiv:2204.09975).

NAD aligns the attention of student s and teacher t order by order; ARGD makes a graph of the orders and aligns that.
With a_l = A(F^l) the unit-norm attention map of residual group l (NAD's "sum-p", p = 2) it minimises

    CE(s(x), y) + sum_l w_l * node_l + w_edge * edge + w_embed * embedding

    node_l     mean over images and pixels of (a_l^s - a_l^t)^2: NAD's "mse"
    edge       mean over the pairs k < l and images of (e_kl^s - e_kl^t)^2,
               e_kl = ||pool(a_k) - a_l||^2, divided by its maximum over the batch (edge_scaling)
    embedding  sum over m, mean over images, of sum_l softmax_l(z_ml) * mean over pixels of (v_l^s - v_m^t)^2
               v = a^2 scaled to unit norm, the student's pooled to the size of the teacher's
               z_ml = (query_m . key_lm + p_m . p'_l) / sqrt(qk_dim)      p: embedding_position, root: embedding_scaling
               query_m = BN(linear(mean of a_m^t)), key_l = ReLU(BN(linear(mean of a_l^s))), key_lm = BN(linear(key_l))

Constants: BililiCode/ARGD@6354666 unless another commit is named.

("argd", "released") does what the released main and train.py do. Its teacher is a WRN-40-2 trained from scratch on the
clean images, whereas README:42 has the victim fine-tuned on them: ("argd", "described") follows that. With a larger
teacher whatever is distilled may do better, so what the graph adds is to be seen beside `nodes_only` with one teacher.
In the released code the optimiser holds the student alone: the embedding is a fixed random projection through which
the student's gradient passes. README and abstract say nothing of it, so "described" leaves it fixed too, and
("argd", "trained-embedding") is "described" with that one thing changed. p and the root were added in May 2022, after
the paper was on arXiv; ("argd", "released-2022-01") is "released" without them.

Sizes. On CIFAR-10 with NAD's released BadNets, described, seed 0, the nodes add up to 0.30 to 1.15 (mean of an epoch),
the edges to 0.0004 to 0.002 and the embedding to 0.010 to 0.011; the latter hardly falls, for maps of different orders
never coincide. With such weights ARGD is close to NAD with betas 2000, 5000, 2000: `nodes_only` tells how close.

Departures. Teacher and student share one clean subset (official runs draw one each). The official teacher is chosen
by its ASR on test images; ours is that of the last epoch. The released embedding weighs 1 whatever its option says;
here the option works. A last batch of a single image, which has no batch statistics, goes without the embedding term.
The paper's text was not readable to us: its weights of the three terms are missing, and all of "described" but the
teacher is the released code.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses import nad
from reproduce.data.augment import Augment
from reproduce.defending import Clean, Defended
from reproduce.errors import UserError
from reproduce.models.taps import features
from reproduce.rng import derive
from reproduce.training import Loss, LossFunction, Observer, Recipe, silent, train

EPSILON = 1e-12     # riman_distance.py:167, the least length of an edge before it is scaled

RECIPE = Recipe(
    epochs=10,                                          # config.py:15
    rates=((0, 0.1), (3, 0.01), (6, 1e-3)),             # utils/util.py:68-76
    batch=64, momentum=0.9, nesterov=True,              # config.py:16,18; main-ARGD.py:202-206
    weight_decay=1e-4,                                  # config.py:19
    augment=Augment(crop=4, flip=True, cutout=2),       # data_loader.py:15-20; Cutout(1, 3) blanks 2x2, :105-112
)
# train.py: epochs 1 to 199 (:128), 0.1 before 30, 0.01 before 60 (:157-163); the rest as above.
SCRATCH = replace(RECIPE, epochs=199, rates=((0, 0.1), (29, 0.01), (59, 1e-3)))


@dataclass(frozen=True)
class Config:
    layers: tuple[str, ...] = ("block1", "block2", "block3")        # models/wresnet.py:103-114
    node_weights: tuple[float, ...] = (2000.0, 5000.0, 2000.0)      # riman_distance.py:128-129
    edge_weight: float = 1.0                                        # config.py:28
    edge_scaling: bool = True                                       # riman_distance.py:180
    embedding_weight: float = 1.0                                   # riman_distance.py:159-163
    embedding_position: bool = True                                 # riman_distance.py:43-45
    embedding_scaling: bool = True                                  # riman_distance.py:45
    qk_dim: int = 128                                               # config.py:26
    train_embedding: bool = False                                   # main-ARGD.py:202-206
    teacher: Literal["finetune", "scratch"] = "finetune"            # README.md:42
    teacher_model: str | None = None                                # architecture if "scratch"; None: the victim's
    # README.md:42: the student's without distillation
    teacher_recipe: Recipe = field(default=RECIPE, metadata={"smoke": 1, "short": 20})
    recipe: Recipe = RECIPE

    def __post_init__(self) -> None:
        if len(self.node_weights) != len(self.layers):
            raise UserError(f"ARGD needs one node weight per layer, not {len(self.node_weights)} for "
                            f"{len(self.layers)} layers")
        if self.edge_weight and len(self.layers) < 2:
            raise UserError("ARGD's edges need two layers or more")
        if self.qk_dim < 1:
            raise UserError(f"ARGD's qk_dim is {self.qk_dim}, it must be at least 1")
        if self.teacher not in ("finetune", "scratch"):
            raise UserError(f"ARGD's teacher is 'finetune' or 'scratch', not {self.teacher!r}")
        if self.teacher_model and self.teacher != "scratch":
            raise UserError("ARGD's teacher_model applies to teacher='scratch' only")

    @property
    def distils(self) -> bool:
        """Whether any term but the cross-entropy has a weight."""
        return any(self.node_weights) or bool(self.edge_weight) or bool(self.embedding_weight)


DESCRIBED = Config()
RELEASED = Config(
    teacher="scratch",                                  # train.py:101-105
    teacher_model="wrn-40-2",                           # main-ARGD.py:167; train.py:102
    teacher_recipe=SCRATCH,
)
SETTINGS = {
    ("argd", "described"): DESCRIBED,
    ("argd", "released"): RELEASED,
    # riman_distance.py:43-48 @992bd4b
    ("argd", "released-2022-01"): replace(RELEASED, embedding_position=False, embedding_scaling=False),
    ("argd", "trained-embedding"): replace(DESCRIBED, train_embedding=True),
}


def requires(config: Config) -> frozenset[str]:
    """Nothing but the clean images."""
    return frozenset()


def nodes_only(config: Config) -> Config:
    """The control: the graph without its edges and its embedding. What is left is NAD, see `as_nad`."""
    return replace(config, edge_weight=0.0, embedding_weight=0.0)


def without_distillation(config: Config) -> Config:
    """The control: the student's fine-tuning unchanged, down to its random streams, with every weight 0."""
    return replace(nodes_only(config), node_weights=(0.0,) * len(config.layers))


def as_nad(config: Config) -> nad.Config:
    """NAD with the node weights as betas and the same teacher: gives the model of `nodes_only(config)` bit for bit."""
    return nad.Config(layers=config.layers, betas=config.node_weights, teacher=config.teacher,
                      teacher_model=config.teacher_model, teacher_recipe=config.teacher_recipe, recipe=config.recipe)


def defend(model: nn.Module, clean: Clean, config: Config, seed: int, observe: Observer = silent,
           clean_model: nn.Module | None = None) -> Defended:
    """The student, trained from a copy of `model`. With every weight 0 no teacher is made."""
    teacher = nad.make_teacher(model, clean, as_nad(config), seed, observe, clean_model) if config.distils else None
    student = deepcopy(model).requires_grad_(True)
    embedding = make_embedding(config, seed).to(clean.images.device) if config.embedding_weight else None
    loss = distillation(teacher, embedding, config)
    if embedding is not None and config.train_embedding:
        _train_both(student, embedding, clean, config.recipe, seed, loss, observe)
    else:
        train(student, clean.images, clean.labels, config.recipe, seed, phase="student", loss=loss, observe=observe)
    return Defended(student)


def _train_both(student: nn.Module, embedding: "Embedding", clean: Clean, recipe: Recipe, seed: int,
                loss: LossFunction, observe: Observer) -> None:
    """Train student and embedding in place with one optimiser; `observe` is shown the student."""

    def student_loss(both: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        return loss(student, images, labels)

    def show_student(phase: str, epoch: int, epochs: int, both: nn.Module, row: dict[str, float]) -> None:
        observe(phase, epoch, epochs, student, row)

    train(nn.ModuleList([student, embedding]), clean.images, clean.labels, recipe, seed, phase="student",
          loss=student_loss, observe=show_student)


def distillation(teacher: nn.Module | None, embedding: "Embedding | None", config: Config) -> LossFunction:
    """CE and the weighted terms of the graph, for `train`."""
    layers = config.layers if teacher is not None else ()

    def loss(student: nn.Module, images: Tensor, labels: Tensor) -> Loss:
        logits, ours = attention_maps(student, images, layers)
        terms = {"ce": F.cross_entropy(logits.float(), labels)}
        if teacher is not None:
            with torch.no_grad():
                _, theirs = attention_maps(teacher, images, layers)
            terms |= graph_terms(ours, theirs, embedding, config)
        return Loss(sum(terms.values()), logits, terms)

    return loss


def attention_maps(model: nn.Module, images: Tensor, layers: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, K) and each layer's attention, (N, H, W) of unit norm."""
    logits, outputs = features(model, images, layers)
    maps = [nad.attention_map(output) for output in outputs]
    return logits, [nad.unit(one).view_as(one) for one in maps]


def graph_terms(student: list[Tensor], teacher: list[Tensor], embedding: "Embedding | None",
                config: Config) -> dict[str, Tensor]:
    """The weighted terms by name, each (); those of weight 0 are left out. Maps: (N, H, W), one per layer."""
    terms = {f"node.{layer}": weight * node_loss(ours, theirs) for layer, weight, ours, theirs
             in zip(config.layers, config.node_weights, student, teacher, strict=True) if weight}
    if config.edge_weight:
        terms["edge"] = config.edge_weight * edge_loss(student, teacher, config.edge_scaling)
    if embedding is not None and len(student[0]) > 1:
        terms["embedding"] = config.embedding_weight * embedding_loss(student, teacher, embedding)
    return terms


def node_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of two unit attention maps (N, H, W)."""
    return (student - teacher).square().mean()


def edge_loss(student: list[Tensor], teacher: list[Tensor], scaling: bool = True) -> Tensor:
    """Mean squared difference of the edges of two graphs. Nodes: unit attention maps (N, H, W), largest first."""
    pairs = list(combinations(range(len(student)), 2))
    differences = [edge(student[k], student[n], scaling) - edge(teacher[k], teacher[n], scaling) for k, n in pairs]
    return torch.stack(differences).square().mean()


def edge(larger: Tensor, smaller: Tensor, scaling: bool = True) -> Tensor:
    """Squared distance of two maps of each image. larger: (N, H, W), pooled to smaller: (N, h, w) -> (N,).

    scaling: divide by the largest in the batch, which makes the edge of an image depend on the others.
    """
    length = (pool(larger, smaller) - smaller).square().sum((1, 2)).clamp(min=EPSILON)
    return length / length.max() if scaling else length


def pool(maps: Tensor, like: Tensor) -> Tensor:
    """(N, H, W) averaged to, or repeated to, the size of `like` (N, h, w)."""
    return maps if maps.shape[1:] == like.shape[1:] else F.adaptive_avg_pool2d(maps, like.shape[1:])


def embedding_loss(student: list[Tensor], teacher: list[Tensor], embedding: "Embedding") -> Tensor:
    """Every order of the teacher against a mixture of all the student's. Maps: (N, H, W) of unit norm, N > 1."""
    # In full precision also under autocast: the means of different images agree in their first digits.
    with torch.autocast(student[0].device.type, enabled=False):
        weights = embedding(*(torch.stack([one.mean((1, 2)) for one in maps], 1) for maps in (student, teacher)))
        squares = [one.square() for one in student]
        total = weights.new_zeros(())
        for t, target in enumerate(teacher):
            theirs = F.normalize(target.square().flatten(1), dim=1)
            ours = torch.stack([F.normalize(pool(one, target).flatten(1), dim=1) for one in squares], 1)
            distances = (ours - theirs[:, None]).square().mean(2)                   # (N, S)
            total = total + (weights[:, t] * distances).sum(1).mean()
    return total


class Embedding(nn.Module):
    """Which of the student's orders each of the teacher's is compared with, from the mean of every map.

    Normalised by the statistics of the batch in either mode.
    """

    def __init__(self, orders: int, qk_dim: int, position: bool, scaling: bool) -> None:
        super().__init__()
        self.orders, self.scale = orders, qk_dim ** -0.5 if scaling else 1.0
        self.query = nn.ModuleList(self._projection(1, qk_dim) for _ in range(orders))
        self.key = nn.ModuleList(self._projection(1, qk_dim) for _ in range(orders))
        self.pair = self._projection(qk_dim, qk_dim * orders)
        self.position = nn.ParameterList(nn.init.xavier_normal_(torch.empty(orders, qk_dim))
                                         for _ in range(2 if position else 0))      # p_t, p_s

    @staticmethod
    def _projection(size_in: int, size_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(size_in, size_out), nn.BatchNorm1d(size_out, track_running_stats=False))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student, teacher: (N, orders) -> (N, T, S), the weights of the student's orders for each of the teacher's."""
        query = torch.stack([layer(mean) for layer, mean in zip(self.query, teacher.split(1, 1), strict=True)], 1)
        key = torch.stack([layer(mean).relu() for layer, mean in zip(self.key, student.split(1, 1), strict=True)], 1)
        key = self.pair(key.flatten(0, 1)).view(len(key), self.orders, self.orders, -1)     # (N, S, T, qk_dim)
        logits = torch.einsum("nstd,ntd->nts", key, query)
        if self.position:
            theirs, ours = self.position
            logits = logits + theirs @ ours.T
        return (logits * self.scale).softmax(2)


def make_embedding(config: Config, seed: int) -> Embedding:
    """The embedding as it is initialised, fixed by the configuration and the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "embedding"))
        return Embedding(len(config.layers), config.qk_dim, config.embedding_position, config.embedding_scaling)
