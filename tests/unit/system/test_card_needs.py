"""What recipes take of real cards, and what else fits, by the table that benchmark=plan made."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from segfit.system.card_needs import careful, share_of_card
from segfit.system.cards import tier_of

HARDWARE = Path(__file__).parents[3] / "conf" / "hardware"
TIERS = ("4gb", "8gb", "12gb", "24gb")


@pytest.mark.parametrize(
    ("card", "total", "free", "tier", "batch"),
    [
        ("1650", 4096, 3900, "4gb", 2),
        ("2060, 1660 Ti", 6144, 5900, "8gb", 4),
        ("3050", 8192, 7799, "8gb", 4),
        ("3080", 10240, 9900, "12gb", 8),
        ("2080 Ti", 11264, 10900, "12gb", 8),
        ("3060", 12288, 12000, "12gb", 8),
        ("MIG 1g.10gb", 9856, 9800, "12gb", 8),
        ("T4", 15360, 15000, "24gb", 16),
        ("4080", 16380, 16000, "24gb", 16),
        ("A4500", 20475, 20100, "24gb", 16),
        ("L4, A10", 23034, 22600, "24gb", 32),
        ("4090, 3090", 24564, 24100, "24gb", 32),
        ("H100", 81559, 81000, "24gb", 32),
        ("3060 beside another training", 12288, 4300, "12gb", 2),
        ("4090 that is nearly full", 24564, 1500, "24gb", 1),
    ],
)
def test_a_recipe_leaves_room_on_every_card(card, total, free, tier, batch):
    assert tier_of(total / 1024) == tier
    recipe = OmegaConf.load(HARDWARE / f"{tier}.yaml")
    new = OmegaConf.merge(recipe, careful("segmentation", tier, recipe, free / 1024))
    assert new.batch_size == batch
    samples = recipe.batch_size * recipe.get("accumulate", 1)
    assert new.batch_size * new.get("accumulate", 1) == samples
    assert ("note" in new.hardware) == (batch != recipe.batch_size)


def test_tasks_without_a_table_keep_their_recipes():
    recipe = OmegaConf.create({"batch_size": 64})
    assert careful("signal", "4gb", recipe, 0.1) == {}


def test_the_share_of_the_card_is_told_and_what_would_fill_it():
    told = share_of_card("segmentation", "segformer_b2", 3 * 256**2, 4, 1, 8.0)
    share, also = told.split("; ")
    assert share.endswith("of 8.0 GiB by plan, 19% of the card")
    assert also.startswith("also fits: segformer_b5 at 512 px, batch ")
    # of a model that is not in the table only what else fits is known
    assert share_of_card("segmentation", "vit", 1, 1, 1, 8.0) == also
    assert share_of_card("segmentation", "vit", 1, 1, 1, 1.0) == ""
    assert share_of_card("signal", "tiny", 1, 1, 1, 8.0) == ""
