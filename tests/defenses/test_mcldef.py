"""MCLDef: its inversions and its loss against numbers of the official code, and what must differ from what."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from defenses import mcldef, nc
from reproduce.data.augment import to_input
from reproduce.errors import UserError
from reproduce.protocols import PROFILES, entries
from reproduce.protocols.mcldef import ESTIMATED, METHOD
from tests.defenses.formulas import Tiny, batches, wave

START = torch.stack([wave((3, 12, 12), 0.9, phase) for phase in (1, 2)]) * 0.5 + 0.5

# PixelBackdoor of Zhihao151/MCL@1ce3f44 (inversion_torch.py) on Tiny, batches() and START, 40 steps, target 1: cost of
# each tenth step and its mean cross-entropy, R and loss; then L1 norm, pixels, sum and sum * wave(1.7) of the trigger.
OFFICIAL_STEPS = {1: (0.001, 0.5704198, 156.9758148, 0.7273957), 11: (0.001, 0.0001385, 152.6942749, 0.1528328),
                  21: (0.0015, 0.0001126, 147.1180267, 0.2207897)}
OFFICIAL_PIXELS = (42.918914794921875, 79, -3.9629297256469727, -2.43697190284729)
# Likewise for target 3, which it never reaches.
OFFICIAL_FAILED_STEPS = {1: (0.001, 1.6378506, 156.9595642, 1.7948099), 11: (0.001 / 1.5 ** 1.5, 0.778331, 153.1584167,
                                                                              0.8616998)}

# inversion of WeCanShow/MCL@7bd932a (main.py) on Tiny, batches() and START[0], START[1, 0], 100 epochs, target 1: sum
# and sum * wave(1.7) of the pattern, and of the mask.
OFFICIAL_MASK = (214.76121520996094, -1.3361862897872925, 17.561635971069336, 0.06835317611694336)

# train_step of Zhihao151/MCL@1ce3f44 (main.py). Loss given the features wave((8, 16), step) with steps 0.7 (anchor),
# 0.71 (positive) and 1.3 (negative) at T = 0.5; with positive and negative exchanged at T = 0.1.
OFFICIAL_LOSS, OFFICIAL_EXCHANGED = 0.23009797930717468, 7.387996673583984
# The sum of each parameter * wave(1.7) after a pass over batches() with the trigger 0.8 * wave((3, 12, 12), 1.7), from
# Tiny plus 0.5 * wave(1.1), against Tiny, rate 0.1: what stage 2 does, whole.
OFFICIAL_WEIGHTS = (-0.27146193385124207, 0.6612886190414429, 0.4814488887786865, 0.27425432205200195)


def heard(call):
    """What `call(observe)` reports, by step."""
    rows = {}
    call(lambda phase, epoch, epochs, model, row: rows.__setitem__(epoch, row))
    return rows


@pytest.mark.parametrize(("target", "steps"), [(1, OFFICIAL_STEPS), (3, OFFICIAL_FAILED_STEPS)])
def test_regulariser_loss_and_cost_are_the_official_ones(target, steps):
    rows = heard(lambda observe: mcldef.invert_pixels(
        nc.frozen(Tiny()), lambda step: batches(), target, START, replace(mcldef.Pixel(), steps=21), observe=observe))
    for step, (cost, entropy, penalty, loss) in steps.items():
        assert rows[step]["cost"] == pytest.approx(cost)
        assert rows[step]["ce"] == pytest.approx(entropy, rel=1e-2)
        assert rows[step]["penalty"] == pytest.approx(penalty, rel=1e-5)
        assert rows[step]["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_trigger_of_2023_is_the_official_one():
    trigger, reached = mcldef.invert_pixels(nc.frozen(Tiny()), lambda step: batches(), 1, START,
                                            replace(mcldef.Pixel(), steps=40))
    l1, changed, total, along = OFFICIAL_PIXELS
    assert reached and trigger.changed() == changed
    assert trigger.l1() == pytest.approx(l1, rel=1e-3)
    assert trigger.pattern.sum().item() == pytest.approx(total, rel=1e-2)
    assert (trigger.pattern * wave((3, 12, 12), 1.7)).sum().item() == pytest.approx(along, rel=1e-2)


def test_an_unreachable_target_gives_no_trigger_but_with_fallback():
    model, settings = nc.frozen(Tiny()), replace(mcldef.Pixel(), steps=20)
    none, reached = mcldef.invert_pixels(model, lambda step: batches(), 3, START, settings)
    assert not reached and none.l1() == 0 and none.changed() == 0
    # Success of 1 is not above 1: never called successful, though the trigger works.
    strict = replace(settings, success=1.01)
    some, reached = mcldef.invert_pixels(model, lambda step: batches(), 1, START, strict, fallback=True)
    assert not reached and some.changed() > 0
    assert (model(some(torch.cat(batches()))).argmax(1) == 1).all()


def test_the_trigger_of_2022_is_the_official_one():
    trigger = mcldef.invert_mask(nc.frozen(Tiny()), lambda step: batches(), 1, START[0], START[1, 0], mcldef.Mask())
    found = [value for part, shape in ((trigger.pattern, (3, 12, 12)), (trigger.mask, (12, 12)))
             for value in (part.sum().item(), (part * wave(shape, 1.7)).sum().item())]
    assert found == pytest.approx(OFFICIAL_MASK, rel=1e-3)


def test_the_mask_inversion_stops_when_the_mask_no_longer_shrinks():
    # Without a penalty the mask grows to where it helps and stays; heard at steps 1, 11, ...
    settings = replace(mcldef.Mask(), cost=-1.0, patience=3)
    rows = heard(lambda observe: mcldef.invert_mask(
        nc.frozen(Tiny()), lambda step: batches(), 1, START[0], START[1, 0], settings, observe))
    assert list(rows) == [1]


def test_contrastive_loss_is_the_official_one():
    anchor, positive, negative = (wave((8, 16), step) for step in (0.7, 0.71, 1.3))
    loss = mcldef.contrastive_loss(anchor, positive, negative, 0.5)
    exchanged = mcldef.contrastive_loss(anchor, negative, positive, 0.1)
    assert loss.item() == pytest.approx(OFFICIAL_LOSS, rel=1e-5)
    assert exchanged.item() == pytest.approx(OFFICIAL_EXCHANGED, rel=1e-5)
    near, far = (torch.exp(F.cosine_similarity(anchor, other) / 0.5) for other in (positive, negative))
    assert loss.item() == pytest.approx(-(near / (near + far)).log().mean().item(), rel=1e-5)


def test_purification_steps_are_the_official_ones():
    model, trigger = Tiny(), mcldef.Trigger(wave((3, 12, 12), 1.7) * 0.8)
    for k, parameter in enumerate(model.parameters()):
        parameter.data.add_(0.5 * wave(parameter.shape, 1.1, k))
    loss = mcldef.purification(nc.frozen(Tiny()), trigger, mcldef.RELEASED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for images in batches():
        optimizer.zero_grad()
        loss(model, images, torch.zeros(8, dtype=torch.int64)).total.backward()
        optimizer.step()
    along = [(p * wave(p.shape, 1.7)).sum().item() for p in model.parameters()]
    assert along == pytest.approx(OFFICIAL_WEIGHTS, rel=1e-4)


def test_a_random_trigger_has_the_same_size_elsewhere():
    pattern = torch.zeros(3, 16, 16)
    pattern[:, 3:6, 4:9] = wave((3, 3, 5), 0.7)
    pattern[1, 4, 4:9] = 0.0
    trigger = mcldef.Trigger(pattern)
    random, again, other = (mcldef.scattered(trigger, seed) for seed in (5, 5, 6))
    assert random.changed() == trigger.changed() == 15
    assert random.l1() == pytest.approx(trigger.l1(), rel=1e-6)
    assert random.pattern.abs().flatten().sort().values.equal(pattern.abs().flatten().sort().values)
    assert random.pattern.equal(again.pattern) and not random.pattern.equal(other.pattern)
    assert (random.pattern.any(0) & pattern.any(0)).sum() < 8


def test_stamping():
    images = torch.full((2, 3, 2, 2), 0.5)
    signed, mask = torch.tensor([0.8, -0.8, 0.1, 0.0]).view(2, 2), torch.tensor([1.0, 0.5, 0.0, 0.001]).view(2, 2)
    added = mcldef.Trigger(signed.expand(3, 2, 2))
    blended = mcldef.Trigger(torch.ones(3, 2, 2), mask)
    torch.testing.assert_close(added(images)[1, 2], torch.tensor([[1.0, 0.0], [0.6, 0.5]]))
    torch.testing.assert_close(blended(images)[1, 2], torch.tensor([[1.0, 0.75], [0.5, 0.5005]]))
    assert added.changed() == 3 and blended.changed() == 2
    assert added.l1() == pytest.approx(3 * 1.7) and blended.l1() == pytest.approx(1.501)
    assert set(added.tensors()) == {"trigger"} and set(blended.tensors()) == {"trigger", "mask"}


def test_the_released_head_stays_the_victims(victim, clean, shorten):
    config = shorten(mcldef.RELEASED, epochs=2)
    released, control = (mcldef.defend(victim, clean, replace(config, loss=loss), 3).model
                         for loss in ("contrastive", "cross-entropy"))
    assert released.fc.weight.equal(victim.fc.weight) and released.fc.bias.equal(victim.fc.bias)
    assert not released.conv1.weight.equal(victim.conv1.weight)
    assert not control.fc.weight.equal(victim.fc.weight)


def test_controls_differ_and_say_what_they_used(backdoored, shorten, same):
    model, clean, target = backdoored
    pixel = replace(mcldef.Pixel(), steps=6)
    configs = {variant: replace(shorten(mcldef.SETTINGS["mcldef", variant]), pixel=pixel, target=target)
               for variant in ("released", "released-2022", "random-trigger", "cross-entropy")}
    done = {variant: mcldef.defend(model, clean, config, 3) for variant, config in configs.items()}
    models = [defended.model for defended in done.values()]
    assert not any(same(a, b) for i, a in enumerate(models) for b in models[:i])
    info = {variant: defended.info for variant, defended in done.items()}
    assert info["released"]["reached"] and info["released"]["success"] > 80
    for name in ("l1", "changed_pixels"):
        assert info["random-trigger"][name] == pytest.approx(info["released"][name], rel=1e-5)
    assert info["random-trigger"]["success"] < info["released"]["success"]
    assert info["cross-entropy"] == info["released"]
    assert done["cross-entropy"].tensors["trigger"].equal(done["released"].tensors["trigger"])
    assert set(done["released-2022"].tensors) == {"trigger", "mask"}


def test_statistics_of_described_are_those_of_clean_images(victim, clean, shorten):
    config = replace(shorten(mcldef.RELEASED), target=4)
    stamped, measured = (mcldef.defend(victim, clean, replace(config, statistics=kind), 3).model
                         for kind in ("stamped", "clean"))
    assert stamped.conv1.weight.equal(measured.conv1.weight)
    seen = measured.conv1(to_input(clean.images)).mean((0, 2, 3))
    torch.testing.assert_close(measured.block1.layer[0].bn1.running_mean, seen, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(stamped.block1.layer[0].bn1.running_mean, seen, atol=1e-4, rtol=1e-3)


def test_a_target_is_estimated_where_none_is_granted(victim, clean, shorten):
    granted, estimated = (mcldef.defend(victim, clean, shorten(mcldef.SETTINGS["mcldef", variant]), 3).info
                          for variant in ("released", "estimated"))
    assert (granted["target"], granted["target_from"]) == (5, "granted") and "mask_norms" not in granted
    norms = estimated["mask_norms"]
    assert estimated["target_from"] == "estimated" and len(norms) == 10
    assert estimated["target"] == norms.index(min(norms)) and "anomaly_index" in estimated


def test_a_target_that_was_found_is_used_as_one_that_was_told(victim, clean, shorten, same):
    config = shorten(mcldef.SETTINGS["mcldef", "estimated"])
    found = mcldef.defend(victim, clean, config, 3)
    told = mcldef.defend(victim, clean, replace(config, target=found.info["target"]), 3)
    assert same(found.model, told.model)


def test_neural_cleanse_run_before_gives_the_same_as_its_own_search(victim, clean, shorten, same):
    config = shorten(mcldef.SETTINGS["mcldef", "described"])
    name, settings = mcldef.builds_on(config)
    assert name == "nc" and mcldef.builds_on(shorten(mcldef.RELEASED)) is None
    before = nc.defend(victim, clean, settings, 3)
    phases = []
    alone = mcldef.defend(victim, clean, config, 3, observe=lambda phase, *row: phases.append(phase))
    after = mcldef.defend(victim, clean, config, 3, base=before.tensors)
    assert same(alone.model, after.model) and alone.info == after.info and "target" in phases
    assert after.info["mask_norms"] == before.info["mask_norms"]


@pytest.mark.parametrize(("variant", "changes"), [
    ("random-trigger", {}), ("cross-entropy", {}), ("released", {"temperature": 0.1}),
    ("released", {"statistics": "clean"}), ("released-2022", {"temperature": 0.1})])
def test_a_trigger_inverted_before_gives_the_same_as_inverting_it(backdoored, shorten, same, variant, changes):
    model, clean, target = backdoored
    config = replace(shorten(mcldef.SETTINGS["mcldef", variant]), target=target, pixel=mcldef.Pixel(steps=6), **changes)
    name, plain = mcldef.builds_on(config)
    assert name == "mcldef" and mcldef.builds_on(plain) is None
    phases = []
    base = mcldef.defend(model, clean, plain, 3)
    alone = mcldef.defend(model, clean, config, 3)
    after = mcldef.defend(model, clean, config, 3, observe=lambda phase, *row: phases.append(phase), base=base.tensors)
    assert same(alone.model, after.model) and alone.info == after.info
    assert set(phases) == {"purification"} and not same(base.model, after.model)
    assert alone.tensors.keys() == after.tensors.keys()
    assert all(alone.tensors[name].equal(after.tensors[name]) for name in alone.tensors)


def test_only_the_same_inversion_is_shared():
    released = mcldef.RELEASED
    for changes in ({"fallback": True, "statistics": "clean"}, {"target": None, "loss": "cross-entropy"},
                    {"target": 3}):
        base = mcldef.builds_on(replace(released, **changes))
        assert base is None or base[0] == "nc"
    steps = replace(released, inversion="random", pixel=mcldef.Pixel(steps=7), target=3)
    assert mcldef.builds_on(steps) == ("mcldef", replace(released, pixel=mcldef.Pixel(steps=7), target=3))


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_the_search_for_the_target_is_the_one_of_the_row_of_neural_cleanse(profile):
    main = entries(replace(profile, seeds=(0,)), ["mcldef"], ["main"])
    found = {entry.labels["defense"]: entry.task for entry in main if entry.labels["attack"] == "BadNets"}
    assert found[ESTIMATED].base().name == found["NC"].name and found[METHOD].base() is None


def test_inversion_does_not_train_the_victim(clean, victim):
    model = nc.frozen(victim)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = replace(mcldef.RELEASED, pixel=replace(mcldef.Pixel(), steps=1))
    mcldef.find_trigger(model, clean, 4, config, 3)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("changes", [
    {"inversion": "pixels"}, {"loss": "kl"}, {"statistics": "none"}, {"temperature": 0.0},
    {"pixel": mcldef.Pixel(steps=0)}, {"mask": mcldef.Mask(steps=0)},
])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError):
        replace(mcldef.RELEASED, **changes)


def test_a_label_the_data_lacks_is_refused(victim, clean):
    with pytest.raises(UserError, match="target 10"):
        mcldef.defend(victim, clean, replace(mcldef.RELEASED, target=10), 3)
