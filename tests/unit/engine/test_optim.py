"""Parameter groups and learning-rate curves."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from segfit.engine.optim import make_optimizer, make_scheduler
from segfit.errors import SegFitError


class Model(nn.Module):
    head_parts = ("head.",)

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def optimizer(model: nn.Module | None = None, **options) -> torch.optim.Optimizer:
    defaults = {
        "name": "adamw",
        "lr": 0.1,
        "weight_decay": 0.01,
        "momentum": 0.9,
        "betas": None,
        "head_lr_factor": 10.0,
        "layer_decay": 1.0,
    }
    return make_optimizer(model or Model(), **{**defaults, **options})


def scheduler(of: torch.optim.Optimizer, **options):
    defaults = {
        "name": "none",
        "updates_per_epoch": 10,
        "epochs": 10,
        "warmup": 0.0,
        "warmup_factor": 0.01,
        "min_factor": 0.0,
        "poly_power": 0.9,
        "step_epochs": 3.0,
        "step_gamma": 0.1,
    }
    return make_scheduler(of, **{**defaults, **options})


def curve(**options) -> list[float]:
    """Return the learning rate of each of 100 updates."""
    of = optimizer(nn.Linear(2, 2), head_lr_factor=1.0)
    schedule = scheduler(of, **options)
    rates = []
    for update in range(100):
        rates.append(of.param_groups[0]["lr"])
        schedule.step_update(update + 1)
    return rates


def group_of(of: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    (group,) = [g for g in of.param_groups if any(p is parameter for p in g["params"])]
    return group


def test_biases_and_norms_have_no_decay_and_new_layers_learn_faster():
    model = Model()
    of = optimizer(model)
    scheduler(of)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of(of, parameter)
        assert group["weight_decay"] == (0.01 if parameter.ndim > 1 else 0.0), name
        assert group["lr"] == pytest.approx(1.0 if name.startswith("head") else 0.1), name


def test_frozen_parameters_are_left_out():
    model = Model()
    held = [parameter for group in optimizer(model).param_groups for parameter in group["params"]]
    assert len(held) == 6
    assert all(parameter is not model.frozen for parameter in held)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum"])
def test_torchs_own_optimizers_are_fused(name):
    of = optimizer(name=name)
    assert all(group["fused"] for group in of.param_groups)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "nadamw", "adan", "lion", "adafactor"])
def test_optimizers_by_name_lower_a_loss(name):
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    inputs = torch.randn(16, 4)
    of = optimizer(model, name=name, lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(30):
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        of.step()
        of.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_betas_reach_the_optimizer():
    assert optimizer(betas=[0.8, 0.95]).param_groups[0]["betas"] == (0.8, 0.95)


@pytest.mark.parametrize(
    ("name", "betas", "needed"), [("muon", 3, 2), ("adamw", 3, 2), ("adan", 2, 3)]
)
def test_betas_that_are_too_many_or_too_few_are_reported_before_the_first_step(name, betas, needed):
    with pytest.raises(SegFitError, match=rf"optimizer\.betas=.*: {name} takes {needed}"):
        optimizer(name=name, betas=[0.9] * betas)


class Shapes(nn.Module):
    """A matrix, a kernel, and what is neither."""

    head_parts = ("matrix.",)

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.matrix = nn.Linear(8, 8)


def updates(model: nn.Module, of: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(number)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        of.step()


def test_muon_turns_matrices_and_kernels_by_equal_amounts_at_the_rates_of_their_groups():
    model = Shapes()
    before = copy.deepcopy(model)
    of = optimizer(model, name="muon", lr=1e-3, weight_decay=0.0)
    scheduler(of)
    updates(model, of, range(1))
    for name, rate in (("kernel", 1e-3), ("matrix", 1e-2)):
        step = (getattr(before, name).weight - getattr(model, name).weight).detach().flatten(1)
        singular = torch.linalg.svdvals(step) / (rate * 0.2 * max(step.shape) ** 0.5)
        assert singular.min() > 0.6, name
        assert singular.max() < 1.3, name
    moments = {name: set(of.state[parameter]) for name, parameter in model.named_parameters()}
    assert [name for name, held in moments.items() if "momentum_buffer" in held] == [
        "kernel.weight",
        "matrix.weight",
    ]
    assert {"exp_avg", "exp_avg_sq"} < moments["depthwise.weight"]
    assert {"exp_avg", "exp_avg_sq"} < moments["norm.weight"]


def test_muon_goes_on_to_the_bit_from_what_a_checkpoint_holds():
    model = Shapes()
    of = optimizer(model, name="muon")
    updates(model, of, range(3))
    file = io.BytesIO()
    torch.save((model.state_dict(), of.state_dict()), file)
    updates(model, of, range(3, 6))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = Shapes()
    resumed.load_state_dict(weights)
    again = optimizer(resumed, name="muon")
    again.load_state_dict(state)
    updates(resumed, again, range(3, 6))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(SegFitError, match=r"optimizer\.name=lammb.*Did you mean 'lamb'\?"):
        optimizer(name="lammb")


def test_an_optimizer_that_cannot_be_made_here_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SegFitError, match=r"optimizer\.name=fusedadam does not work"):
        optimizer(name="fusedadam")  # needs APEX


def test_none_keeps_the_rate():
    assert curve(name="none") == [pytest.approx(0.1)] * 100


def test_cosine_falls_from_the_peak_to_the_floor():
    rates = curve(name="cosine", min_factor=0.1)
    expected = [0.01 + 0.09 * (1 + math.cos(math.pi * t / 100)) / 2 for t in range(100)]
    assert rates == pytest.approx(expected)


def test_poly_follows_its_power():
    rates = curve(name="poly", poly_power=0.9)
    assert rates == pytest.approx([0.1 * (1 - t / 100) ** 0.9 for t in range(100)])


def test_step_drops_every_step_epochs():
    rates = curve(name="step", step_epochs=3, step_gamma=0.5)
    assert rates == pytest.approx([0.1 * 0.5 ** (t // 30) for t in range(100)])


@pytest.mark.parametrize("name", ["none", "cosine", "poly", "step"])
def test_warm_up_rises_linearly_and_then_the_curve_goes_on(name):
    rates = curve(name=name, warmup=0.2, warmup_factor=0.1)
    assert rates[:20] == pytest.approx([0.01 + 0.09 * t / 20 for t in range(20)])
    assert rates[20:] == pytest.approx(curve(name=name)[20:])


def test_new_layers_stay_ahead_all_along_the_curve():
    of = optimizer()
    schedule = scheduler(of, name="cosine", warmup=0.1)
    for update in range(1, 100):
        schedule.step_update(update)
        rates = sorted({group["lr"] for group in of.param_groups})
        assert rates[1] == pytest.approx(10 * rates[0])


def rates_of(model: nn.Module, **options) -> dict[str, float]:
    """Return the learning rate of each parameter before the first update, times lr."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of = optimizer(model, head_lr_factor=1.0, **options)
    groups = of.param_groups
    return {names[id(one)]: group["lr_scale"] for group in groups for one in group["params"]}


def test_layers_of_a_vit_learn_at_the_rates_that_timm_gives_them():
    import timm
    from timm.optim import param_groups_layer_decay

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=3)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    theirs = {
        f"encoder.{names[id(one)]}": group["lr_scale"]
        for group in param_groups_layer_decay(vit, layer_decay=0.75)
        for one in group["params"]
    }
    model = Model()
    model.encoder = vit
    ours = rates_of(model, layer_decay=0.75)
    assert {name: ours.pop(name) for name in theirs} == pytest.approx(theirs)
    assert set(ours.values()) == {1.0}  # the head


def test_other_models_are_cut_into_twelve_layers_in_order():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(24)))
    rates = rates_of(model, layer_decay=0.5)
    assert [rates[f"{index}.weight"] for index in range(24)] == [
        0.5 ** (11 - index // 2) for index in range(24)
    ]
    assert set(rates_of(model).values()) == {1.0}
