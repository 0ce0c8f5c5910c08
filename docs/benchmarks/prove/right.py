"""Part "right": the same numbers as on a CPU, and nothing waits."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prove.shared import DEVICE, EVERYTHING, called, composed, named, read, taken, training
from segfit.assembly.task import assembly_of
from segfit.engine.checkpoint import load_checkpoint
from segfit.engine.compiling import compiled_or_eager
from segfit.engine.precision import Precision, set_tf32
from segfit.engine.step import make_update
from segfit.system import cards as driver
from segfit.tasks.segmentation.assembly import make_augment
from segfit.tuning.measure import first_window


def cards(*, toy: bool) -> Any:  # noqa: ARG001
    """Compare the driver's list of cards with torch's."""
    theirs = []
    for number in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(number)
        theirs.append([str(one.uuid), one.total_memory])
    return {"driver": [repr(gpu) for gpu in driver.visible_gpus()], "torch": theirs}


def context(*, toy: bool) -> Any:
    """Return the GiB that are taken after the first tensor, product, convolution, attention and compiled function."""
    side = 64 if toy else 1024
    found = {"nothing": taken()}
    square = torch.ones(side, side, device=DEVICE)
    image = square.view(1, 1, side, side)
    steps: dict[str, Callable[[], Any]] = {
        "tensor": lambda: square + 1,
        "product": lambda: square @ square,
        "convolution": lambda: F.conv2d(image, torch.ones(1, 1, 3, 3, device=DEVICE)),
        "attention": lambda: F.scaled_dot_product_attention(image, image, image),
        "compiled": lambda: torch.compile(lambda x: x.sin() + 1)(square),
    }
    for name, step in steps.items():
        step()
        found[name] = taken()
    return found


def waits(*, toy: bool, model: str, precision: str) -> Any:
    """Make updates with everything on; any wait for the device is an error."""
    one = training(composed(*named(model, toy), f"precision={precision}", *EVERYTHING, toy=toy))
    fit = one.fit
    window = first_window(fit)
    fit.state.model.train()
    for number in range(4):
        # The first ones choose algorithms and load kernels, which waits.
        if number == 2 and DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        seeds = [2 * number, 2 * number + 1]
        loss, norm, *_ = make_update(fit.state, fit.task, window, seeds, 1.0)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return {"loss": float(loss), "norm": float(norm)}


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def exact(*, toy: bool, model: str) -> Any:
    """Return relative errors of the device's fp32 without TF32 against the CPU's fp64: logits, losses, gradients."""
    set_tf32(False)
    config = composed(*named(model, toy), "model.dropout=0", toy=toy)
    assembly, host = assembly_of(config), torch.device("cpu")
    torch.manual_seed(0)
    network, _ = assembly.make_network(config, pretrained=True)
    twin = (
        copy.deepcopy(network).double().eval()
    )  # no drop path, and the statistics of batch norm as they are
    network = network.to(DEVICE).eval()
    images = torch.rand(2, 3, config.image_size, config.image_size)
    targets = torch.randint(0, config.data.num_classes, (2, *images.shape[2:]))
    found = {}
    for loss in ("ce", "dice_ce", "lovasz_ce", "focal", "tversky"):
        other = composed(*named(model, toy), f"loss={loss}", toy=toy)
        values = []
        for net, device, dtype in ((network, DEVICE, torch.float32), (twin, host, torch.float64)):
            net.zero_grad()
            task = assembly.make_task(other, device)
            aims = targets.to(device)
            logits = net(images.to(device, dtype))
            value = task.loss(logits, aims, task.totals(aims))
            value.backward()
            gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
            values.append((logits, value, torch.cat(gradients)))
        found[loss] = dict(zip(("logits", "loss", "gradient"), map(_error, *values), strict=True))
    return found


def augmentation(*, toy: bool) -> Any:
    """Return the largest difference of augmented images and the share of other mask pixels, device against CPU."""
    set_tf32(False)
    plain = [one for one in EVERYTHING if "noise" not in one]  # the device draws it by itself
    augment = make_augment(composed(*plain, "augmentation.noise=0", toy=toy), "kornia-gpu")
    assert augment is not None
    side = 64 if toy else 256
    images, masks = torch.rand(8, 3, side, side), torch.randint(0, 4, (8, side, side))
    ours, labels = augment(images.to(DEVICE), masks.to(DEVICE), seed=1)
    theirs, expected = augment(images, masks, seed=1)
    differ = (labels.cpu() != expected).float().mean()
    return {"images": float((ours.cpu() - theirs).abs().max()), "masks": float(differ)}


def rounding(*, toy: bool, fast: bool, precision: str) -> Any:
    """Return the relative error of b0's logits in a precision, without TF32 in what stays fp32, against fp64."""
    set_tf32(False)
    config = composed(*named("segformer_b0", toy), f"model.fast={str(fast).lower()}", toy=toy)
    network, _ = assembly_of(config).make_network(config, pretrained=True)
    images = torch.rand(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        expected = copy.deepcopy(network).double().eval()(images.double())
        with Precision(precision, DEVICE.type).autocast():
            found = network.to(DEVICE).eval()(images.to(DEVICE))
    return {"logits": _error(found, expected)}


def repeated(*, toy: bool, model: str) -> Any:
    """Say whether two deterministic runs, and one that was resumed half-way, have the same weights in bits."""
    options = [*named(model, toy), "deterministic=true", "epochs=2"]
    first, second, half = (
        called("train.py", *options, *more, toy=toy)[0] for more in ([], [], ["max_steps=2"])
    )
    called("train.py", f"resume={half}", "max_steps=null", base=())
    return {"again": _same(first, second), "resumed": _same(first, half)}


def _same(one: Any, other: Any) -> bool:
    states = []
    for run in (one, other):
        states.append(load_checkpoint(run / "checkpoints" / "last.pt")["model"])
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def compiled(*, toy: bool, model: str) -> Any:
    """Return the relative error of compiled logits against eager ones, both without TF32."""
    set_tf32(False)
    config = composed(*named(model, toy), "model.dropout=0", toy=toy)
    network, _ = assembly_of(config).make_network(config, pretrained=True)
    network = network.to(DEVICE, memory_format=torch.channels_last)
    example = assembly_of(config).example_input(config, 2, DEVICE)
    forward, notice = compiled_or_eager(network, example, Precision("fp32", DEVICE.type))
    network.eval()
    images = torch.rand_like(example)  # the example has no content
    with torch.no_grad():
        return {"logits": _error(forward(images), network(images)), "notice": notice}


def learns(*, toy: bool, precision: str) -> Any:
    """Return the scores after 200 updates on shapes."""
    run, _ = called(
        "train.py", *named("cnn", toy), f"precision={precision}", f"max_steps={4 if toy else 200}",
        "epochs=100", f"val_every={100 if not toy else 1}", toy=toy,
    )  # fmt: skip
    metrics = read(run / "metrics.json")
    return {name: metrics[name] for name in ("best", "precision", "seconds", "status")}
