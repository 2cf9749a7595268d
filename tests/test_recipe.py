"""Recipes: what is decided by the network's row, by choices and by settings; and which images a step takes."""

import json
import math
import random
import tomllib
from dataclasses import asdict, replace
from typing import Any

import pytest
import timm
from conftest import ROOT
from tiny import cli

from fixefficientnet import manifest
from fixefficientnet._internal import records
from fixefficientnet.errors import RecipeError
from fixefficientnet.reproduce import recipe as recipes
from fixefficientnet.reproduce.checkpoints import Position
from fixefficientnet.reproduce.online import order, steps_of_epoch, tasks_from
from fixefficientnet.reproduce.recipe import Recipe

TABLE = tomllib.loads((ROOT / "recipes.toml").read_text(encoding="utf-8"))
PAPER = [key for key, variant in manifest.load().items() if variant.paper]
TINY = "test_efficientnet.r160_in1k"


def resolve(key: str, **choices: Any) -> Recipe:
    return recipes.resolve(recipes.subject_of_variant(manifest.find(key)), choices)


def resolve_tiny(**choices: Any) -> Recipe:
    return recipes.resolve(recipes.subject_of_backbone(TINY), choices)


def fields(recipe: Recipe, section: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in section}


# --- what decides -------------------------------------------------------------------------------------------


def test_the_table_has_the_papers_variants_and_no_others():
    assert len(PAPER) == 18
    for method in ("online", "cached"):
        assert set(TABLE[method]["variants"]) == set(PAPER)


@pytest.mark.parametrize("method", ["online", "cached"])
@pytest.mark.parametrize("key", PAPER)
def test_every_variant_of_the_paper_has_a_recipe(key: str, method: str):
    assert resolve(key).method == "online"
    variant, recipe, row = manifest.find(key), resolve(key, method=method), TABLE[method]["variants"][key]
    assert variant.paper is not None
    assert recipe.test_size == variant.paper.fix.test_size
    assert recipe.train_size == variant.train_size
    assert recipe.test == variant.test
    assert (recipe.variant, recipe.backbone, recipe.weights) == (key, variant.backbone.name, "pretrained")
    assert (recipe.stage, recipe.tune) == ("fixres", "fixres")
    assert fields(recipe, row) == row
    rest = {name: value for name, value in TABLE[method].items() if name not in row and name != "variants"}
    assert fields(recipe, rest) == rest
    # measured before tuning as timm measures these weights, at the size they were trained at
    cfg = timm.get_pretrained_cfg(variant.backbone.name)
    assert cfg is not None
    assert recipe.base == replace(variant.test, size=variant.train_size, crop_pct=cfg.crop_pct)


@pytest.mark.parametrize("key", PAPER)
def test_the_classifier_moves_as_far_with_both_methods(key: str):
    """By the sum of the learning rates of all steps, on ImageNet."""
    sums = []
    for method in ("online", "cached"):
        recipe = resolve(key, method=method)
        assert recipe.views == 1
        steps = 1_281_167 // recipe.batch_size
        points = [epoch + step / steps for epoch in range(recipe.epochs) for step in range(steps)]
        sums.append(sum(map(recipe.learning_rate, points)))
    assert sums[1] == pytest.approx(sums[0], rel=0.05)


@pytest.mark.parametrize("key", PAPER)
def test_the_base_stage_has_no_rows(key: str):
    recipe = resolve(key, stage="base")
    assert fields(recipe, TABLE["base"]) == TABLE["base"]
    assert recipe.method == "online"
    assert resolve(key, stage="base") == resolve(key, stage="base")


def test_a_network_of_none_of_ours_takes_the_general_values():
    cfg = timm.get_pretrained_cfg(TINY)
    assert cfg is not None
    recipe = resolve_tiny()
    general = {
        method: {name: value for name, value in TABLE[method].items() if name != "variants"}
        for method in ("online", "cached")
    }
    assert fields(recipe, general["online"]) == general["online"]
    assert (recipe.variant, recipe.backbone, recipe.test_size, recipe.train_size) == (TINY, TINY, 160, 160)
    assert (recipe.crop_pct, recipe.base_crop_pct) == (1, cfg.crop_pct)
    assert (recipe.mean, recipe.std, recipe.interpolation) == (cfg.mean, cfg.std, cfg.interpolation)
    assert fields(resolve_tiny(method="cached"), general["cached"]) == general["cached"]
    assert resolve_tiny(weights="random").base_crop_pct == 1  # nobody trained it for a crop of timm's


@pytest.mark.parametrize("name", ["resnet51", "test_efficientnett.r160_in1k"])
def test_a_network_that_timm_has_not_is_refused_with_a_near_one(name: str):
    with pytest.raises(RecipeError, match=rf"timm has no model '{name}'.* Did you mean \w+"):
        recipes.subject_of_backbone(name)


def test_choices_win_over_the_table():
    assert resolve("b5").base_lr == 1e-4
    assert resolve("b5", base_lr=0.5).base_lr == 0.5
    assert resolve("b5", base_lr=None).base_lr == 1e-4
    assert resolve("b5", test_size=96, train_size=48).test.size == 96
    assert resolve("b5", test_size=96, train_size=48).base.size == 48


def test_what_was_chosen_is_all_that_changes():
    plain, chosen = asdict(resolve("b3")), asdict(resolve("b3", views=5, seed=7, tune="bn"))
    assert {name for name in plain if plain[name] != chosen[name]} == {"views", "seed", "tune"}


# --- choices ------------------------------------------------------------------------------------------------


def flags(*arguments: str) -> dict[str, Any]:
    """The choices that the command line makes of flags."""
    from fixefficientnet.cli.app import app
    from fixefficientnet.cli.reproduce import reproduce

    command, bound, _ = app.parse_args(["reproduce", "b0", *arguments], exit_on_error=False, print_error=False)
    assert command is reproduce
    return {name: value for name, value in asdict(bound.arguments["choices"]).items() if value is not None}


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--epochs 7", {"epochs": 7}),
        ("--base-lr 1e-4", {"base_lr": 1e-4}),
        ("--base-lr 3", {"base_lr": 3.0}),
        ("--sync-bn", {"sync_bn": True}),
        ("--mean 0.1 0.2 0.3", {"mean": (0.1, 0.2, 0.3)}),
        ("--tune bn-stats", {"tune": "bn-stats"}),
        ("--feature-dtype float32", {"feature_dtype": "float32"}),
    ],
)
def test_every_field_of_a_recipe_is_a_flag_of_its_type(flag: str, expected: dict[str, Any]):
    found = flags(*flag.split())
    assert found == expected
    assert [type(value) for value in found.values()] == [type(value) for value in expected.values()]
    assert fields(resolve("b0", **found), expected) == expected


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--epochs", "--epochs"),
        ("--epochs 1.5", "--epochs"),
        ("--base-lr fast", "--base-lr"),
        ("--mean 0.5 0.5", "--mean requires 3"),
        ("--base-lrr 1", "Did you mean --base-lr"),
        ("--batchsize 1", "Did you mean --batch-size"),
        ("--variant b1", "Unknown option"),
        ("--weights random", "There is no option --weights. Did you mean --checkpoint?"),
    ],
)
def test_a_flag_that_cannot_be_read_is_refused(flag: str, said: str):
    _, err = cli("reproduce", "b0", "--plan", *flag.split(), status=2)
    assert said in err.replace('"', "")  # older cyclopts quote the flag


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"epochs": 0}, "epochs: must be a whole number above 0, is 0"),
        ({"epochs": 1.5}, "epochs: must be a whole number"),
        ({"batch_size": -4}, "batch_size: must be a whole number above 0, is -4"),
        ({"test_size": 8}, "test_size: must be a whole number of at least 32, is 8"),
        ({"views": 0}, "views: .* is 0"),
        ({"seed": -1}, "seed: .* is -1"),
        ({"base_lr": -0.1}, r"base_lr: .* is -0\.1"),
        ({"base_lr": math.nan}, "base_lr: .* is nan"),
        ({"momentum": math.inf}, "momentum: .* is inf"),
        ({"hflip": 1.5}, r"hflip: must be a number from 0 to 1, is 1\.5"),
        ({"hflip": math.nan}, "hflip: .* is nan"),
        ({"crop_pct": 0}, "crop_pct: must be a number in"),
        ({"base_crop_pct": 1.1}, r"base_crop_pct: .* is 1\.1"),
        ({"tune": "everything"}, "tune: must be one of fixres, all, classifier, bn, bn-stats, is 'everything'"),
        ({"schedule": "linear"}, "schedule: must be one of step, cosine, is 'linear'"),
        ({"mixed_precision": "fp8"}, "mixed_precision: .* is 'fp8'"),
        ({"feature_dtype": "int8"}, "feature_dtype: .* is 'int8'"),
        ({"method": "offline"}, "method: must be one of online, cached, is 'offline'"),
        ({"stage": "first"}, "stage: must be one of fixres, base, is 'first'"),
        ({"interpolation": "nearest"}, "interpolation: must be one of bilinear, bicubic"),
        ({"std": (0, 0, 0)}, "std"),
        ({"mean": (math.nan, 0, 0)}, r"mean\[0\]"),
        ({"mean": (0.5, 0.5)}, "mean: must be a list of three"),
        ({"label_smoothing": 1}, "label_smoothing"),
        ({"sync_bn": "yes"}, "sync_bn: must be true or false"),
        ({"zzz": 1}, "unknown key zzz"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused(choice: dict[str, Any], said: str):
    with pytest.raises(RecipeError, match=said):
        resolve("b0", **choice)


def test_cached_features_and_the_norms_weight_exclude_each_other():
    with pytest.raises(RecipeError, match=r"tune bn .*--method online.*--tune bn-stats"):
        resolve("b0", tune="bn", method="cached")
    assert resolve("b0", tune="bn").method == "online"
    with pytest.raises(RecipeError, match=r"tune all .*--method online.*--tune fixres"):
        resolve("b0", tune="all", method="cached")
    assert resolve("b0", tune="bn-stats", method="cached").moves_statistics


@pytest.mark.parametrize("choices", [{"method": "cached"}, {"tune": "bn"}, {"tune": "bn-stats"}])
def test_the_base_stage_trains_online_and_a_classifier(choices: dict[str, str]):
    with pytest.raises(RecipeError, match="The base stage trains online"):
        resolve("b0", stage="base", **choices)
    assert resolve("b0", stage="base", tune="classifier").trains_classifier


def test_what_a_choice_of_tune_moves():
    expected = {"fixres": (True, True), "all": (True, True), "classifier": (False, True)}
    expected |= {"bn": (True, False), "bn-stats": (True, False)}
    for tune, moves in expected.items():
        recipe = resolve("b0", tune=tune)
        assert (recipe.moves_statistics, recipe.trains_classifier) == moves


def test_json_of_fixres_has_no_fields_of_the_base_stage():
    """So that deltas and runs from before there were such fields are as they would be now."""
    base, fixres = (records.to_json(resolve("b0", stage=stage)) for stage in ("base", "fixres"))
    assert base.keys() - fixres.keys() == {"warmup_epochs", "model_ema_decay", "patience"}
    with pytest.raises(RecipeError, match=r"Of the base stage alone: warmup_epochs, patience\."):
        resolve("b0", warmup_epochs=0, patience=3)


def test_differences_name_the_field_and_both_values():
    one, other = resolve("b0"), resolve("b0", base_lr=0.5, seed=3)
    assert recipes.differences(one, one) == []
    assert recipes.differences(one, other) == ["base_lr: 0.001 there, 0.5 here", "seed: 0 there, 3 here"]
    assert recipes.differences(other, one) == ["base_lr: 0.5 there, 0.001 here", "seed: 3 there, 0 here"]


def test_a_recipe_is_whole_in_its_json():
    recipe = resolve("b4_ns", mean=(0.1, 0.2, 0.3))
    assert records.read(Recipe, json.loads(json.dumps(records.to_json(recipe))), "recipe", RecipeError) == recipe


# --- learning rate ------------------------------------------------------------------------------------------


def test_the_learning_rate_is_fixres_rule_and_falls_at_30_and_60():
    recipe = resolve("b0", epochs=90, batch_size=256, base_lr=1e-3)
    full = 8 * 1e-3 * 256 / 512
    for epoch, factor in ((0, 1), (29, 1), (29.99, 1), (30, 0.1), (59.9, 0.1), (60, 0.01), (89.9, 0.01)):
        assert recipe.learning_rate(epoch) == pytest.approx(full * factor), epoch
    assert resolve("b0").learning_rate(0) == pytest.approx(8 * 1e-3)
    assert resolve("l2").learning_rate(0) == pytest.approx(4e-4)


def test_the_step_schedule_has_its_own_pace_and_factor():
    recipe = resolve("b0", lr_decay=0.5, lr_decay_epochs=2, batch_size=512, base_lr=0.125)
    assert [recipe.learning_rate(epoch) for epoch in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_the_cosine_schedule_falls_from_all_to_nothing():
    recipe = resolve("b0", epochs=12, schedule="cosine", batch_size=64, base_lr=0.01)
    full = 8 * 0.01 * 64 / 512
    rates = [recipe.learning_rate(epoch / 4) for epoch in range(49)]
    assert rates[0] == pytest.approx(full)
    assert rates[16] == pytest.approx(full * 0.75)  # a third of the steps: (1 + cos 60°) / 2
    assert rates[24] == pytest.approx(full / 2)
    assert rates[32] == pytest.approx(full / 4)
    assert rates[48] == pytest.approx(0, abs=1e-12)
    assert rates == sorted(rates, reverse=True)


# --- which images a step takes ----------------------------------------------------------------------------


def small(seed: int = 0, epochs: int = 3, batch: int = 6) -> Recipe:
    return resolve_tiny(seed=seed, epochs=epochs, batch_size=batch)


def test_an_epochs_order_is_a_permutation_of_its_own():
    found = [order(small(seed), epoch, 50).tolist() for seed in range(3) for epoch in range(3)]
    assert all(sorted(sequence) == list(range(50)) for sequence in found)
    assert len({tuple(sequence) for sequence in found}) == 9
    random.seed(5)
    assert found == [order(small(seed), epoch, 50).tolist() for seed in range(3) for epoch in range(3)]
    for other in (small(batch=2), small(epochs=9)):  # another batch or length of training takes the same order
        assert order(other, 1, 50).tolist() == found[1]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_processes_together_take_each_epochs_order(world: int):
    for length in (6, 7, 30, 35):
        recipe = small(batch=6)
        parts = [list(tasks_from(Position(), recipe, length, rank, world)) for rank in range(world)]
        steps = length // 6
        assert [len(part) for part in parts] == [3 * steps] * world
        for number, shares in enumerate(zip(*parts, strict=True)):
            assert [len(share) for share in shares] == [6 // world] * world
            epoch, step = divmod(number, steps)
            together = [task for line in zip(*shares, strict=True) for task in line]  # in turn
            assert together == [(epoch, index) for index in order(recipe, epoch, length)[step * 6 : step * 6 + 6]]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_from_a_position_on_only_the_rest_is_taken(world: int):
    recipe = small()
    for rank in range(world):
        whole = list(tasks_from(Position(), recipe, 30, rank, world))
        for done in range(len(whole) + 1):
            position = Position(*divmod(done, 5), done)
            assert list(tasks_from(position, recipe, 30, rank, world)) == whole[done:], done


def test_fewer_images_than_a_batch_make_one_step():
    assert steps_of_epoch(small(batch=512), 30) == (1, 30)
    assert steps_of_epoch(small(batch=512), 31, 2) == (1, 30)
    assert steps_of_epoch(small(batch=30), 30) == (1, 30)
    (first, *_), (second, *_) = (list(tasks_from(Position(), small(batch=512), 31, rank, 2)) for rank in range(2))
    assert len(first) == len(second) == 15
    assert len({index for _, index in first + second}) == 30


def test_a_last_partial_batch_is_left_out():
    assert steps_of_epoch(small(batch=8), 30) == (3, 8)
    assert steps_of_epoch(small(batch=8), 31, 4) == (3, 8)


@pytest.mark.parametrize(("batch", "length", "world"), [(7, 30, 2), (8, 30, 3), (1, 30, 2), (512, 1, 2), (4, 2, 3)])
def test_a_batch_that_the_processes_cannot_share_is_refused(batch: int, length: int, world: int):
    with pytest.raises(RecipeError, match=f"{world} processes cannot share evenly"):
        steps_of_epoch(small(batch=batch), length, world)
