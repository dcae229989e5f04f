"""Fine-tuning, alone and as NAD's teacher."""

import torch

from defenses import ft, nad
from reproduce.training import Recipe, predict, silent


def test_is_the_teacher_of_nad_bit_for_bit(victim, clean, shorten, same):
    config = shorten(nad.SETTINGS["nad", "released"], epochs=2)
    teacher = nad.make_teacher(victim, clean, config, 4, silent, None)
    assert same(teacher, ft.defend(victim, clean, ft.Config(config.teacher_recipe), 4).model)


def test_trains_every_layer(victim, clean, shorten):
    frozen = ft.deepcopy(victim).requires_grad_(False)
    tuned = ft.defend(frozen, clean, shorten(ft.Config()), 4).model
    assert all(not torch.equal(a, b) for a, b in zip(tuned.parameters(), victim.parameters(), strict=True))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_learns(victim, clean):
    recipe = Recipe(epochs=5, rates=((0, 0.02), (4, 0.002)), batch=10)
    tuned = ft.defend(victim, clean, ft.Config(recipe), 4).model
    assert (predict(tuned, clean.images) == clean.labels).float().mean() > 0.9


def test_trains_only_the_layers_it_is_told_to(victim, clean):
    recipe = Recipe(epochs=1, rates=((0, 0.02),), batch=50, weight_decay=0.1)
    tuned = ft.fine_tune(victim, clean, recipe, 4, only=["block1", "fc"])
    moved = {name for name, value in tuned.named_parameters() if not torch.equal(value, victim.get_parameter(name))}
    assert moved == {name for name, _ in victim.named_parameters() if name.startswith(("block1.", "fc."))}
    assert not torch.equal(tuned.bn1.running_mean, victim.bn1.running_mean)
    assert all(parameter.requires_grad for parameter in tuned.parameters())


def test_the_rate_of_the_bench_is_torchs_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    for epoch in range(100):
        assert abs(ft.BENCH.rate(epoch) - optimizer.param_groups[0]["lr"]) < 1e-9
        optimizer.step()
        scheduler.step()
