"""What holds a training up, from recorded facts: the cases of a CUDA card, and of the CPU alone."""

from dataclasses import replace
from typing import Any

import pytest

from segfit.tuning.change import Change
from segfit.tuning.verdict import Costs, Facts, Resident, predicted, predictions, verdict

MS = 1e-3
# A card that computes 50 ms an update; the host needs 20 of them to queue it; 8 workers of 16 cores are fast enough.
CARD = Facts(
    cuda=True,
    samples=16,
    update=51 * MS,
    phases={
        "data": 0.2 * MS,
        "copy": 0.3 * MS,
        "augmentation": 2 * MS,
        "forward": 8 * MS,
        "backward": 8 * MS,
        "optimizer": 1.5 * MS,
        "logging": 30 * MS,  # 20 updates' worth of waiting for the device, spread over them
    },
    resident=50 * MS,
    launching=19.5 * MS,
    costs=Costs(decode=10 * MS, fit=2 * MS, augment=1 * MS),
    cached=Costs(decode=0.1 * MS, augment=1 * MS),
    workers=8,
    cores=16,
    threads=8,
)
# The same network without a card: two cores do everything, in one process.
CPU = Facts(
    cuda=False,
    samples=4,
    update=340 * MS,
    phases={"data": 40 * MS, "augmentation": 5 * MS, "forward": 90 * MS, "backward": 190 * MS, "optimizer": 10 * MS},
    resident=295 * MS,
    launching=0.0,
    costs=Costs(decode=9 * MS, augment=1 * MS),
    cached=Costs(decode=0.1 * MS, augment=1 * MS),
    workers=0,
    cores=2,
    threads=2,
)  # fmt: skip


def tried(
    bottleneck: str, options: dict[str, Any], resident: float, samples: int, remark: str = ""
) -> Resident:
    return Resident(Change(bottleneck, options, remark), resident, samples)


def with_phases(facts: Facts, **phases: float) -> Facts:
    """Return facts with phases (ms) replaced, and the update longer by as much."""
    new = {**facts.phases, **{name: value * MS for name, value in phases.items()}}
    longer = sum(new.values()) - sum(facts.phases.values())
    return replace(facts, phases=new, update=facts.update + longer)


def starved(**costs: float) -> Facts:
    """Return the card behind workers that do not keep up: 16 samples over 8 workers take twice their cost."""
    costs_ms = Costs(**{name: value * MS for name, value in costs.items()})
    update = 2 * costs_ms.total
    phases = {**CARD.phases, "data": update - 21 * MS, "logging": 1 * MS}
    return replace(CARD, costs=costs_ms, update=update, phases=phases)


def test_a_card_that_is_fed_is_bound_by_the_model():
    found = verdict(CARD)
    assert (found.bottleneck, found.best) == ("the model's own arithmetic", None)
    assert all(one.gain < 1.05 for one in found.predictions)


@pytest.mark.parametrize(
    ("costs", "bottleneck", "change"),
    [
        ({"augment": 90, "decode": 10}, "too few workers", "loader.workers"),
        ({"wait": 80, "decode": 10}, "slow disk", "data.cache"),
        ({"wait": 1, "decode": 200}, "image decoding", "data.cache"),
    ],
)
def test_what_starves_a_card_is_named(costs, bottleneck, change):
    facts = starved(**costs)
    facts = replace(facts, cached=Costs(decode=0.1 * MS, augment=facts.costs.augment))
    found = verdict(facts)
    assert found.bottleneck == bottleneck
    assert change in found.best.change.options
    assert found.best.gain > 1.5


def test_augmentation_is_named_where_every_core_augments_already():
    kept = Costs(decode=0.1 * MS, augment=90 * MS)
    facts = replace(starved(augment=90, decode=10), cores=8, cached=kept)
    on_the_card = tried("CPU augmentation", {"augmentation": "kornia-gpu"}, 55 * MS, 16)
    found = verdict(replace(facts, tried=[on_the_card]))
    assert found.bottleneck == "CPU augmentation"
    # the loader's 200 ms become 20, the card's 50 become 55: now the card sets the pace
    assert found.best.gain == pytest.approx(200 / 55)


def test_a_card_gets_as_many_workers_as_there_are_cores_beside_the_one_that_launches():
    facts = replace(starved(augment=90, decode=10), cached=None, cores=13)
    best = verdict(facts).best
    assert best.change.typed == "loader.workers=12"
    assert best.gain == pytest.approx(12 / 8)


def test_pageable_memory_is_named():
    facts = replace(with_phases(CARD, copy=25, logging=0), pin_memory=False, update=80 * MS)
    found = verdict(facts)
    assert found.bottleneck == "no pinned memory"
    assert found.best.change.typed == "loader.pin_memory=true"
    assert found.best.gain == pytest.approx(80 / 54.8)


def test_blocking_copies_are_named():
    # Nothing is queued ahead: each copy waits for the update before it, and the card for the host after it.
    facts = replace(
        CARD,
        non_blocking=False,
        update=75 * MS,
        phases={**CARD.phases, "copy": 50 * MS, "logging": 1 * MS},
    )
    found = verdict(facts)
    assert found.bottleneck == "blocking copies"
    assert found.best.change.typed == "loader.non_blocking=true"
    assert found.best.gain == pytest.approx(75 / 50)


def test_copies_of_pinned_memory_that_do_not_block_are_never_named():
    facts = with_phases(CARD, copy=30)
    assert {"no pinned memory", "blocking copies"}.isdisjoint(
        one.change.name for one in predictions(facts)
    )


@pytest.mark.parametrize("log_every", [1, 5])
def test_reading_the_device_all_the_time_is_named(log_every):
    facts = replace(
        CARD, log_every=log_every, update=75 * MS, phases={**CARD.phases, "logging": 50 * MS}
    )
    found = verdict(facts)
    assert "reads the device" in found.bottleneck
    assert found.best.change.typed == "report.log_every=20"
    assert found.best.gain > 1.2


@pytest.mark.parametrize("facts", [CARD, replace(CPU, workers=1, threads=1)])
def test_workers_that_start_anew_every_epoch_are_named(facts):
    restarted = replace(
        with_phases(facts, data=400), restart=390 * MS, refill=10 * MS, persistent=False
    )
    found = verdict(restarted)
    assert found.bottleneck == "workers restarted every epoch"
    assert found.best.change.typed == "loader.persistent=true"
    undisturbed = restarted.update - 400 * MS + restarted.refill
    assert found.best.gain == pytest.approx(restarted.update / undisturbed, rel=0.03)
    kept = [one.change.name for one in predictions(replace(restarted, persistent=True))]
    assert "workers restarted every epoch" not in kept


def test_a_tiny_batch_is_named_where_a_larger_one_takes_no_longer():
    trials = [
        tried("too small a batch", {"batch_size": 32}, 52 * MS, 32, "another effective batch"),
        tried("too small a batch", {"batch_size": 64}, 60 * MS, 64, "another effective batch"),
    ]
    found = verdict(
        replace(CARD, workers=16, cores=32, tried=trials, cached=None, costs=Costs(decode=1 * MS))
    )
    assert found.best.change.typed == "batch_size=64"
    assert found.best.gain == pytest.approx(4 * 51 / 60)


def test_what_changes_the_learning_has_to_gain_clearly_more():
    free = tried("the stock model", {"model.fast": True}, 30 * MS, 16)
    larger = tried("too small a batch", {"batch_size": 32}, 55 * MS, 32, "another effective batch")
    facts = replace(CARD, tried=[larger, free], costs=Costs(decode=1 * MS))
    assert verdict(facts).best.change.typed == "model.fast=true"
    free_too = replace(larger, change=Change("", {"batch_size": 32, "accumulate": 1}))
    assert (
        verdict(replace(facts, tried=[free_too, free])).best.change.typed
        == "batch_size=32 accumulate=1"
    )


def test_a_faster_model_does_not_help_a_starved_card():
    fast = tried("the stock model", {"model.fast": True}, 10 * MS, 16)
    facts = replace(starved(decode=100), tried=[fast])
    assert next(
        one for one in predictions(facts) if one.change.name == "the stock model"
    ).gain == pytest.approx(1)


# A busy card: the queue is full, so that launching takes the host as long as the device takes for all of it.
FULL_QUEUE = replace(
    CARD,
    update=100 * MS,
    phases={
        "data": 1 * MS,
        "copy": 0.5 * MS,
        "augmentation": 4 * MS,
        "forward": 33 * MS,
        "backward": 55 * MS,
        "optimizer": 4.5 * MS,
        "logging": 2 * MS,
    },
    resident=98 * MS,
    launching=20 * MS,
    costs=Costs(decode=2 * MS, fit=1 * MS, augment=1 * MS),
    cached=None,
)


def test_a_full_queue_does_not_hide_what_a_busy_card_would_gain():
    trials = [
        tried("full precision", {"precision": "bf16"}, 45 * MS, 16),
        tried("many small kernels", {"compile": True}, 60 * MS, 16),
        tried("the stock model", {"model.fast": True}, 70 * MS, 16),
    ]
    found = verdict(replace(FULL_QUEUE, tried=trials))
    assert (found.bottleneck, found.best.change.typed) == ("full precision", "precision=bf16")
    assert found.best.gain == pytest.approx(100 / 45)
    gains = [one.gain for one in found.predictions if one.change.name != "too few workers"]
    assert gains == pytest.approx([100 / 45, 100 / 60, 100 / 70])


def test_what_the_host_takes_to_launch_bounds_the_gain():
    trials = [tried("full precision", {"precision": "bf16"}, 45 * MS, 16)]
    found = verdict(replace(FULL_QUEUE, launching=60 * MS, tried=trials))
    # the trial shows that it launches within 45 ms; copying and the rest of the host come on top
    assert found.best.gain == pytest.approx(100 / 45.5)


def test_fewer_launches_help_where_the_host_sets_the_pace():
    launching = {"augmentation": 2, "forward": 4, "backward": 5, "optimizer": 1, "logging": 0}
    phases = {name: value * MS for name, value in launching.items()}
    facts = replace(CARD, update=12 * MS, phases=phases, resident=12 * MS, launching=12 * MS)
    facts = replace(facts, costs=Costs(decode=1 * MS), cached=None)
    compiled = tried("many small kernels", {"compile": True}, 5 * MS, 16)
    found = verdict(replace(facts, tried=[compiled]))
    assert found.best.change.typed == "compile=true"
    assert found.best.gain == pytest.approx(12 / 5)


def test_what_helps_is_named_though_a_remark_lowers_it_below_what_does_not_help():
    batch = {"batch_size": 32}
    larger = tried("too small a batch", batch, 85 * MS, 32, "the effective batch grows")
    useless = tried("full precision", {"precision": "bf16"}, 50 * MS, 16)
    found = verdict(replace(CARD, tried=[larger, useless]))
    assert 1.05 < found.best.gain < 1.25
    assert found.best.change == larger.change


# --------------------------------------------------------------------------------------- no card


def test_on_the_cpu_workers_that_decode_promise_nothing_where_every_core_computes():
    found = {one.change.name: one.gain for one in predictions(CPU)}
    assert found["too few workers"] <= 1.01
    assert found["image decoding"] == pytest.approx(340 / (300 + 40 * 0.11))


def test_on_the_cpu_a_spare_core_may_read():
    best = verdict(
        replace(CPU, threads=1, phases={**CPU.phases, "data": 100 * MS}, cached=None)
    ).best
    assert best.change.typed == "loader.workers=1"
    assert best.gain == pytest.approx(340 / 240)


def test_on_the_cpu_workers_help_against_waiting():
    costs = Costs(wait=99 * MS, decode=1 * MS)
    facts = replace(
        CPU, costs=costs, cached=None, update=700 * MS, phases={**CPU.phases, "data": 400 * MS}
    )
    best = verdict(facts).best
    assert best.change.name == "too few workers"
    assert best.gain == pytest.approx(700 / 304, rel=0.05)
    assert best.change.remark == "if the disk can serve so many at once"
    for copying in (0.1, 3.0):  # 3: a little less than what many workers promise
        cached = verdict(replace(facts, cached=Costs(decode=copying * MS))).best
        assert cached.change.options == {"data.cache": "ram"}


def test_on_the_cpu_workers_may_take_the_cores_from_the_arithmetic():
    disturbed = {
        "data": 1 * MS,
        "augmentation": 10 * MS,
        "forward": 400 * MS,
        "backward": 500 * MS,
        "optimizer": 30 * MS,
    }
    larger = tried("too small a batch", {"batch_size": 32}, 300 * MS, 32)
    facts = replace(CPU, workers=2, update=941 * MS, phases=disturbed, tried=[larger])
    found = verdict(facts)
    assert found.best.change.typed == "loader.workers=0"
    assert found.best.gain == pytest.approx(941 / (295 + 40), rel=0.01)
    assert "loader.workers" not in {
        key
        for one in predictions(replace(facts, cores=4))
        for key in one.change.options
        if one.change.options[key] == 0
    }


def test_on_the_cpu_workers_disturb_a_larger_batch_by_as_much_an_image():
    disturbed = {**CPU.phases, "data": 1 * MS, "forward": 190 * MS}
    larger = tried("too small a batch", {"batch_size": 8}, 500 * MS, 8, "another effective batch")
    facts = replace(CPU, workers=1, update=396 * MS, phases=disturbed, tried=[larger])
    found = next(one for one in predictions(facts) if one.change.name == "too small a batch")
    # 100 ms that the worker takes from an update's arithmetic become 200
    assert found.gain == pytest.approx(2 * 396 / (395 + 205 + 100))


def test_on_the_cpu_faster_arithmetic_shortens_the_update_by_as_much():
    fast = tried("the stock model", {"model.fast": True}, 100 * MS, 4)
    found = verdict(replace(CPU, tried=[fast]))
    assert found.bottleneck == "the stock model"
    assert found.best.gain == pytest.approx(340 / (340 - 195))


def test_on_the_cpu_nothing_is_said_of_pinned_memory():
    facts = replace(CPU, pin_memory=False, non_blocking=False)
    assert {"loader.pin_memory", "loader.non_blocking"}.isdisjoint(
        key for one in predictions(facts) for key in one.change.options
    )


@pytest.mark.parametrize("facts", [CARD, CPU, starved(decode=100)])
def test_the_model_of_an_update_gives_back_what_was_recorded(facts):
    assert predicted(facts, Change("nothing")).gain == pytest.approx(1, rel=0.05)


def test_options_that_mean_nothing_to_a_task_are_not_advised():
    advised = {key for one in predictions(CPU) for key in one.change.options}
    assert {"loader.workers", "data.cache"} <= advised
    left = predictions(replace(CPU, idle=["loader.workers"]))
    assert {key for one in left for key in one.change.options} == advised - {"loader.workers"}
