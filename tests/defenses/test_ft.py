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
