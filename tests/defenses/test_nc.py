"""Neural Cleanse: its inversion, schedule and outliers against numbers of other people's code."""

from dataclasses import replace
from itertools import cycle, groupby

import pytest
import torch

from defenses import nc
from reproduce.errors import UserError
from tests.defenses.formulas import Tiny, batches, wave

# Cost of each step as (cost, how many steps) until it stopped early, of visualizer.py in bolunwang/backdoor@e857774
# with the constants of its example, given `scripted` in place of a network.
OFFICIAL_COSTS = [(0, 10), (0.001, 7), (0.00035355339059327376, 8), (0.0007071067811865475, 5),
                  (0.001414213562373095, 7), (0.0005, 8), (0.001, 5), (0.002, 5)]

# After 80 epochs of train_step of SCLBD/BackdoorBench@f02e353 (defense/nc.py) with its config.yaml, on Tiny, batches()
# and theta = wave((4, 12, 12), 0.9): class, sum of the mask, sum of mask * wave(1.7), sum of pattern * wave(1.7).
PEER = (1, 1.483426809310913, -0.6449824571609497, -0.3295193314552307)
PEER_SETTINGS = nc.Inversion(batches=3, batch=8, success=0.98, from_zero=False, stop_ratio=0.99)


def scripted(step: int) -> tuple[float, float]:
    """(norm, success) of a step."""
    return 100 / (1 + step) if step < 30 else 5 + step % 3, 1.0 if step % 20 < 12 and not 3 <= step < 5 else 0.5


def test_schedule_and_early_stop_are_the_official_ones():
    search, costs = nc.Search(nc.Inversion()), []
    while not search.done and len(costs) < 200:
        costs.append(search.schedule.cost)
        search.update(*scripted(len(costs) - 1))
    assert [(pytest.approx(cost), len(list(steps))) for cost, steps in groupby(costs)] == OFFICIAL_COSTS


def test_the_smallest_successful_trigger_is_kept_and_the_last_until_there_is_one():
    search = nc.Search(nc.Inversion())
    heard = [(9.0, 0.5), (8.0, 0.5), (7.0, 1.0), (6.0, 0.5), (7.5, 1.0), (6.5, 1.0)]
    assert [search.update(*row) for row in heard] == [True, True, True, False, False, True]


def test_inversion_is_the_peers():
    label, norm, mask, pattern = PEER
    found = nc.invert(nc.frozen(Tiny()), cycle(batches()), (label,), wave((4, 12, 12), 0.9)[None], PEER_SETTINGS)
    found_mask, found_pattern = found.trigger(label)
    assert found.norms() == [pytest.approx(norm, rel=1e-3)]
    assert (found_mask * wave((12, 12), 1.7)).sum().item() == pytest.approx(mask, rel=1e-3)
    assert (found_pattern * wave((3, 12, 12), 1.7)).sum().item() == pytest.approx(pattern, rel=1e-2)


def test_the_bench_inverts_like_the_peer_one_pass_at_a_time_from_full_triggers(victim, clean, monkeypatch):
    bench = nc.SETTINGS["fmp", "described"].inversion
    assert replace(bench, batches=3, batch=8, ones=False) == PEER_SETTINGS
    seen, starts, invert = [], [], nc.invert

    def watched(model, stream, classes, start, settings, *rest):
        starts.append(start)
        return invert(model, (seen.append(len(part)) or part for part in stream), classes, start, settings, *rest)

    monkeypatch.setattr(nc, "invert", watched)
    nc.invert_classes(victim, clean, (1, 2), replace(bench, steps=2, batch=40), 5)
    assert seen == [40, 40, 20] * 2
    assert (starts[0] == 1).all() and starts[0].shape == (2, 4, 16, 16)


def test_work_of_a_pass_is_its_images():
    passes, counted = nc.Inversion(steps=7, batches=None), nc.Inversion(steps=7, batches=3, batch=10)
    assert nc.inversion_work(passes, 250, 4) == 7 * 250 * 4 and nc.inversion_work(counted, 250, 4) == 7 * 30 * 4


def test_classes_inverted_together_are_those_inverted_one_by_one():
    start = torch.stack([wave((4, 12, 12), 0.9, k) for k in range(4)])
    settings = replace(PEER_SETTINGS, steps=40, patience=1, stop_patience=2)
    model = nc.frozen(Tiny())
    together = nc.invert(model, cycle(batches()), (0, 1, 2, 3), start, settings)
    for k in range(4):
        alone = nc.invert(model, cycle(batches()), (k,), start[k:k + 1], settings)
        assert alone.steps[0] == together.steps[k]
        torch.testing.assert_close(alone.masks[0], together.masks[k], atol=1e-3, rtol=0)
    assert len(set(together.steps)) > 1, "some class should have stopped before another"


# outlier_detection of bolunwang/backdoor@e857774 (mad_outlier_detection.py), and the last line from its README.
@pytest.mark.parametrize(("norms", "index", "flagged"), [
    ([64.0, 58.5, 16.1, 71.25, 80.0, 49.75], 2.832861, [2]),
    ([10, 20, 30, 40, 50, 60, 70, 80, 5, 100], 1.079185, []),
    ([3.0, 30, 31, 29, 2.5, 30.5, 28, 33, 31.5, 30], 14.838797, [4, 0]),
    ([64.466667 - 13.238736 / 1.4826, 64.466667, 16.117647, 64.466667 + 13.238736 / 1.4826, 90.0], 3.652087, [2]),
])
def test_outliers_are_the_official_ones(norms, index, flagged):
    assert nc.outliers(norms) == (pytest.approx(index, rel=1e-5), flagged)


def test_backdoorbench_takes_the_lower_of_two_middle_norms():
    """Its outlier_detection (huangd1999/BackdoorBench@6135839: v1, defense/nc/nc.py:421-427) is torch.median's."""
    norms = torch.tensor([3.0, 40, 41, 42, 43, 60, 61, 62, 63, 64])
    median = norms.median()
    index = (median - norms.min()) / (1.4826 * (norms - median).abs().median())
    assert nc.outliers(norms.tolist(), lower_median=True)[0] == pytest.approx(index.item())
    assert nc.outliers(norms.tolist())[0] != pytest.approx(index.item(), rel=0.1)
    assert nc.SETTINGS["fmp", "described"].lower_median and not nc.SETTINGS["mcldef", "described"].lower_median


def test_a_large_mask_is_no_outlier_and_equal_ones_are_none():
    assert nc.outliers([30, 31, 29, 30, 500])[1] == []
    assert nc.outliers([7.0] * 5) == (0.0, [])


def test_one_pass_shows_every_image_once():
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 3, 4, 4).contiguous()
    parts = list(nc.one_pass(images, 4, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert sorted((torch.cat(parts)[:, 0, 0, 0] * 255).round().int().tolist()) == list(range(10))
    assert [len(part) for part in nc.one_pass(images, 4, torch.Generator(), drop_last=True)] == [4, 4]
    assert [len(part) for part in nc.one_pass(images, 64, torch.Generator(), drop_last=True)] == [10]


def test_the_target_of_a_planted_backdoor_is_found_and_unlearnt(backdoored, backdoor_success, shorten):
    model, clean, target = backdoored
    inversion = nc.Inversion(steps=14, batches=3, success=0.9, from_zero=False, cost=0.01, factor=1.5, patience=1)
    config = replace(shorten(nc.Config(), epochs=2), inversion=inversion)
    done = nc.defend(model, clean, config, 3)
    norms = done.info["mask_norms"]
    assert done.info["target"] == target == norms.index(min(norms)) and done.info["unlearnt"] == [target]
    assert done.info["target_from"] == "estimated" and done.info["anomaly_index"] > 1
    assert done.info["success"] > 80
    assert done.tensors["mask"].sum().item() == pytest.approx(min(norms), rel=1e-4)
    assert backdoor_success(done.model) < backdoor_success(model)


def test_a_granted_target_is_the_only_one_inverted(victim, clean, shorten):
    done = nc.defend(victim, clean, replace(shorten(nc.Config()), target=4), 3)
    assert done.info["target"] == 4 and done.info["target_from"] == "granted" and len(done.info["mask_norms"]) == 1
    assert done.tensors["masks"].shape == (1, 16, 16)


def test_only_flagged_leaves_a_model_without_outlier_alone(victim, clean, shorten, same):
    config = replace(shorten(nc.Config()), threshold=1e9)
    untouched, repaired = (nc.defend(victim, clean, replace(config, only_flagged=only), 3) for only in (True, False))
    assert same(untouched.model, victim) and untouched.info["unlearnt"] == [] and "trigger" not in untouched.tensors
    assert not same(repaired.model, victim) and repaired.info["unlearnt"] == [repaired.info["target"]]


def test_a_share_is_stamped_and_dealt_out_in_turn():
    images = torch.full((50, 3, 4, 4), 100, dtype=torch.uint8)
    corner = torch.zeros(4, 4)
    corner[0, 0] = 1.0
    half = torch.zeros(4, 4)
    half[3, 3] = 0.5
    stamped = nc.stamp_share(images, [(corner, torch.ones(3, 4, 4)), (half, torch.zeros(3, 4, 4))], 0.2, 7)
    assert (stamped[:, 0, 0, 0] == 255).sum() == 5 and (stamped[:, 2, 3, 3] == 50).sum() == 5
    assert ((stamped != images).flatten(1).any(1)).sum() == 10 and (stamped != images).sum() == 30
    assert images.eq(100).all()


@pytest.mark.parametrize("make", [
    lambda: nc.Config(share=0.0), lambda: nc.Inversion(steps=0), lambda: nc.Inversion(success=1.5),
    lambda: nc.Inversion(patience=0),
])
def test_impossible_settings_are_refused(make):
    with pytest.raises(UserError):
        make()


def test_a_label_the_data_lacks_is_refused(victim, clean):
    with pytest.raises(UserError, match="target 12"):
        nc.defend(victim, clean, nc.Config(target=12), 3)


def test_success_is_counted_on_other_classes(victim):
    model = nc.frozen(victim)
    images, labels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 0, 1, 2, 3, 4])
    said = int(model(torch.zeros(1, 3, 16, 16)).argmax())
    assert nc.success_rate(model, images, labels, said) == 100.0
    assert nc.success_rate(model, images, torch.full((6,), said), said) == 0.0
