"""ARGD: its graph against numbers of the official code, and what must coincide with NAD."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from defenses import argd, nad
from reproduce.errors import UserError
from reproduce.training import predict, train

SHAPES = ((8, 16, 8, 8), (8, 32, 4, 4), (8, 64, 2, 2))
WIDTH = 16      # qk_dim of the comparison

# riman_distance.py of BililiCode/ARGD ("head": 6354666, "january": 992bd4b) on outputs(0.7) as the student's and
# outputs(1.3) as the teacher's, its modules in train mode with the weights of `filled`; torch 2.15 on a CPU.
NODES = (0.0006752129411324859, 3.738708983291872e-05, 1.7612963347346522e-05)      # AT(2.0), each layer
EDGE = 0.00212538312189281
EDGE_01 = (0.9954318404197693, 0.9957355856895447, 0.9961267709732056, 0.9973422884941101,
           0.9977377653121948, 0.9974512457847595, 0.9992319941520691, 1.0)          # euclidean_dist_fms, student
EMBEDDING = {"head": 0.0022624924313277006, "january": 0.0023361756466329098}
TOTAL = {"head": 1.5769751071929932, "january": 1.5770487785339355}
# The softmax for image 1: a row for each order of the teacher.
ATTENTION = {
    "head": ((0.7678781151771545, 0.2243776172399521, 0.007744225673377514),
             (0.32134222984313965, 0.08015919476747513, 0.5984985828399658),
             (0.06471788138151169, 0.8940863609313965, 0.041195791214704514)),
    "january": ((0.83450847864151, 0.16485929489135742, 0.0006322084227576852),
                (0.7710608243942261, 0.2265697866678238, 0.0023694734554737806),
                (0.2574366629123688, 0.2823016047477722, 0.4602617919445038)),
}
GRADIENT = {"head": (0.5161885023117065, 0.8563839197158813, 0.6447842121124268),    # norm, for each student output
            "january": (0.5162604451179504, 0.8564373850822449, 0.6453020572662354)}
VARIANTS = ("head", "january")


def wave(shape, step):
    """A tensor every version of torch agrees on."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step).float().view(shape)


def outputs(step):
    """Outputs of the three groups for 8 images, from diffuse to sharp."""
    power = torch.linspace(0.5, 4, 8).view(-1, 1, 1, 1)
    return [wave(shape, step).abs() ** power for shape in SHAPES]


def maps(features):
    return [nad.unit(one).view_as(one) for one in map(nad.attention_map, features)]


def filled(variant):
    """Parameter k is wave(its shape, 0.5 + k / 10).

    The official module got the same in the order: query layers, key layers, bilinear, each as linear weight and bias,
    bn weight and bias; then p_t and p_s.
    """
    embedding = argd.Embedding(3, WIDTH, position=variant == "head", scaling=variant == "head")
    with torch.no_grad():
        for k, parameter in enumerate(embedding.parameters()):
            parameter.copy_(wave(parameter.shape, 0.5 + 0.1 * k))
    return embedding


def terms(variant, student, config=None):
    config = config or argd.Config(qk_dim=WIDTH, embedding_position=variant == "head",
                                   embedding_scaling=variant == "head")
    return argd.graph_terms(maps(student), maps(outputs(1.3)), filled(variant), config)


@pytest.fixture
def short(shorten):
    """A setting of ARGD cut to two epochs."""
    return lambda variant, **changes: replace(shorten(argd.SETTINGS["argd", variant], epochs=2), **changes)


def test_nodes_are_the_official_ones():
    found = [float(argd.node_loss(s, t)) for s, t in zip(maps(outputs(0.7)), maps(outputs(1.3)), strict=True)]
    assert found == pytest.approx(NODES, rel=2e-5)


def test_edges_are_the_official_ones():
    student, teacher = maps(outputs(0.7)), maps(outputs(1.3))
    assert argd.edge(*student[:2]).tolist() == pytest.approx(EDGE_01, abs=1e-6)
    assert float(argd.edge_loss(student, teacher)) == pytest.approx(EDGE, rel=1e-5)


def test_edges_without_scaling_follow_their_definition():
    student, teacher = maps(outputs(0.7)), maps(outputs(1.3))

    def lengths(nodes):
        pooled = [nodes[0].view(8, 4, 2, 4, 2).mean((2, 4)), nodes[0].view(8, 2, 4, 2, 4).mean((2, 4)),
                  nodes[1].view(8, 2, 2, 2, 2).mean((2, 4))]
        return torch.stack([((large - small) ** 2).sum((1, 2))
                            for large, small in zip(pooled, (nodes[1], nodes[2], nodes[2]), strict=True)])

    ours, theirs = lengths(student), lengths(teacher)
    assert float(argd.edge_loss(student, teacher, scaling=False)) == pytest.approx(
        float(((ours - theirs) ** 2).mean()), rel=1e-4)
    scaled = [each / each.max(1, keepdim=True).values for each in (ours, theirs)]
    assert float(argd.edge_loss(student, teacher)) == pytest.approx(
        float(((scaled[0] - scaled[1]) ** 2).mean()), rel=1e-4)


def test_only_scaled_edges_depend_on_the_rest_of_the_batch():
    larger, smaller = maps(outputs(0.7))[:2]
    torch.testing.assert_close(argd.edge(larger, smaller, scaling=False)[:3],
                               argd.edge(larger[:3], smaller[:3], scaling=False))
    assert not torch.allclose(argd.edge(larger, smaller)[:3], argd.edge(larger[:3], smaller[:3]), rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_embedding_is_the_official_one(variant):
    student, teacher, embedding = maps(outputs(0.7)), maps(outputs(1.3)), filled(variant)
    means = [torch.stack([one.mean((1, 2)) for one in nodes], 1) for nodes in (student, teacher)]
    torch.testing.assert_close(embedding(*means)[1], torch.tensor(ATTENTION[variant]), atol=5e-5, rtol=0)
    assert argd.embedding_loss(student, teacher, embedding).item() == pytest.approx(EMBEDDING[variant], rel=1e-5)
    embedding.eval()
    assert argd.embedding_loss(student, teacher, embedding).item() == pytest.approx(EMBEDDING[variant], rel=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_total_and_its_gradient_are_the_official_ones(variant):
    student = [one.requires_grad_() for one in outputs(0.7)]
    total = sum(terms(variant, student).values())
    assert total.item() == pytest.approx(TOTAL[variant], rel=1e-5)
    gradients = torch.autograd.grad(total, student)
    assert [float(one.norm()) for one in gradients] == pytest.approx(GRADIENT[variant], rel=1e-4)


@pytest.mark.parametrize("name", ["edge", "embedding"])
def test_each_term_reaches_every_layer_of_the_student(name):
    student = [one.requires_grad_() for one in outputs(0.7)]
    gradients = torch.autograd.grad(terms("head", student)[name], student)
    assert all(float(one.norm()) > 1e-6 for one in gradients)


def test_terms_have_their_weights_and_zero_means_left_out():
    config = argd.Config(node_weights=(10.0, 0.0, 3.0), edge_weight=7.0, embedding_weight=0.5, qk_dim=WIDTH)
    found = terms("head", outputs(0.7), config)
    assert list(found) == ["node.block1", "node.block3", "edge", "embedding"]
    assert [one.item() for one in found.values()] == pytest.approx(
        [10 * NODES[0], 3 * NODES[2], 7 * EDGE, 0.5 * EMBEDDING["head"]], rel=2e-5)
    assert list(terms("head", outputs(0.7), replace(config, edge_weight=0.0))) == [
        "node.block1", "node.block3", "embedding"]


def test_embedding_keeps_full_precision_under_autocast():
    student, teacher, embedding = maps(outputs(0.7)), maps(outputs(1.3)), filled("head")
    with torch.autocast("cpu", torch.bfloat16):
        found = argd.embedding_loss(student, teacher, embedding)
    assert torch.equal(found, argd.embedding_loss(student, teacher, embedding))


def test_embedding_comes_from_the_seed_alone():
    before = torch.get_rng_state()
    first, second, third = (argd.make_embedding(argd.Config(), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    same, other = [[torch.equal(a, b) for a, b in zip(first.parameters(), each.parameters(), strict=True)]
                   for each in (second, third)]
    assert all(same) and not all(other)


def test_nodes_alone_are_the_loss_of_nad(victim, clean, short):
    config = short("described")
    teacher = nad.make_teacher(victim, clean, argd.as_nad(config), 7, lambda *_: None, None)
    images, labels = clean.images[:32].float() / 255, clean.labels[:32]
    student = nad.deepcopy(victim).eval()
    ours = argd.distillation(teacher, None, argd.nodes_only(config))(student, images, labels)
    theirs = nad.distillation(teacher, argd.as_nad(config))(student, images, labels)
    assert torch.equal(ours.total, theirs.total)
    assert list(ours.terms.values()) == list(theirs.terms.values())
    assert list(ours.terms) == ["ce", "node.block1", "node.block2", "node.block3"]


@pytest.mark.parametrize("changes", [{}, {"teacher": "scratch", "teacher_model": "wrn-10-2"}])
def test_nodes_alone_give_the_model_of_nad_bit_for_bit(changes, victim, clean, short, same):
    config = short("described", **changes)
    theirs = nad.defend(victim, clean, argd.as_nad(config), 7).model
    assert argd.as_nad(config).betas == (2000.0, 5000.0, 2000.0)
    assert same(argd.defend(victim, clean, argd.nodes_only(config), 7).model, theirs)
    assert not same(argd.defend(victim, clean, config, 7).model, theirs)


def test_without_distillation_is_nads_control_and_makes_no_teacher(victim, clean, short, same):
    config, phases = argd.without_distillation(short("released")), set()
    model = argd.defend(victim, clean, config, 7, observe=lambda phase, *_: phases.add(phase)).model
    assert phases == {"student"}
    assert same(model, nad.defend(victim, clean, nad.without_distillation(argd.as_nad(config)), 7).model)


def test_settings_differ_in_what_their_names_say():
    described, released = argd.SETTINGS["argd", "described"], argd.SETTINGS["argd", "released"]
    teacher = {"teacher": "finetune", "teacher_model": None, "teacher_recipe": argd.RECIPE}
    assert replace(released, **teacher) == described
    assert (released.teacher, released.teacher_model, released.teacher_recipe.epochs) == ("scratch", "wrn-40-2", 199)
    assert [released.teacher_recipe.rate(epoch) for epoch in (28, 29, 58, 59, 198)] == [0.1, 0.01, 0.01, 1e-3, 1e-3]
    assert [released.recipe.rate(epoch) for epoch in (2, 3, 5, 6, 9)] == [0.1, 0.01, 0.01, 1e-3, 1e-3]


@pytest.fixture
def embeddings(monkeypatch):
    """Every embedding made in the test, beside its parameters as they were made."""
    made, make = [], argd.make_embedding

    def keep(config, seed):
        embedding = make(config, seed)
        made.append((embedding, [p.detach().clone() for p in embedding.parameters()]))
        return embedding

    monkeypatch.setattr(argd, "make_embedding", keep)
    return made


@pytest.mark.parametrize(("variant", "trained"), [("trained-embedding", True), ("described", False),
                                                  ("released", False)])
def test_only_the_trained_embedding_is_trained(variant, trained, victim, clean, short, embeddings):
    config = short(variant, teacher="finetune", teacher_model=None)
    argd.defend(victim, clean, config, 7)
    (embedding, before), = embeddings
    moved = [not torch.equal(now, then) for now, then in zip(embedding.parameters(), before, strict=True)]
    assert all(moved) if trained else not any(moved)


def test_training_the_embedding_shows_the_student_and_changes_it(victim, clean, short, same):
    seen, config = [], short("trained-embedding")
    model = argd.defend(victim, clean, config, 7, observe=lambda *heard: seen.append(heard)).model
    students = [heard[3] for heard in seen if heard[0] == "student"]
    assert len(students) == 2 and all(student is model for student in students) and not model.training
    predict(model, clean.images[:2])
    assert not same(model, argd.defend(victim, clean, replace(config, train_embedding=False), 7).model)
    # Without an embedding there is nothing to train.
    alone = argd.nodes_only(config)
    assert same(argd.defend(victim, clean, alone, 7).model,
                argd.defend(victim, clean, replace(alone, train_embedding=False), 7).model)


def test_records_every_term(victim, clean, short):
    rows = []
    argd.defend(victim, clean, short("described"), 7, observe=lambda phase, *rest: rows.append((phase, rest[-1])))
    row = dict(rows)["student"]
    names = ["ce", "node.block1", "node.block2", "node.block3", "edge", "embedding"]
    assert all(row[name] > 0 for name in names)
    assert row["loss"] == pytest.approx(sum(row[name] for name in names), rel=1e-5)


def test_a_last_batch_of_one_image_has_no_embedding_term(victim, clean):
    config = argd.Config(recipe=replace(argd.RECIPE, epochs=1, batch=33))
    teacher = nad.deepcopy(victim).eval()
    loss = argd.distillation(teacher, argd.make_embedding(config, 0), config)
    student = nad.deepcopy(victim)
    train(student, clean.images, clean.labels, config.recipe, 0, phase="student", loss=loss)     # 100 = 3 * 33 + 1
    assert all(p.isfinite().all() for p in student.parameters())
    assert "embedding" not in loss(student, clean.images[:1].float() / 255, clean.labels[:1]).terms


def test_no_weight_decay_or_gradient_reaches_the_teacher(victim, clean, short, same, monkeypatch):
    teachers, make = [], nad.make_teacher

    def keep(*arguments) -> nn.Module:
        teacher = make(*arguments)
        teachers.append((teacher, nad.deepcopy(teacher)))
        return teacher

    monkeypatch.setattr(nad, "make_teacher", keep)
    argd.defend(victim, clean, short("trained-embedding"), 7)
    (teacher, before), = teachers
    assert same(teacher, before) and not teacher.training


@pytest.mark.parametrize(("changes", "message"), [
    ({"node_weights": (1.0,)}, "one node weight per layer"),
    ({"layers": ("block3",), "node_weights": (1.0,)}, "two layers"),
    ({"qk_dim": 0}, "qk_dim"),
    ({"teacher": "clean"}, "'finetune' or 'scratch'"),
    ({"teacher_model": "wrn-40-2"}, "scratch"),
])
def test_contradictory_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(argd.Config(), **changes)
