"""Part "right": the same numbers as on a CPU, and nothing waits."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prove.shared import DEVICE, EVERYTHING, GIB, called, composed, named, read, taken, training
from segfit.assembly.task import assembly_of
from segfit.engine.checkpoint import load_checkpoint
from segfit.engine.compiling import compiled_or_eager
from segfit.engine.precision import Precision, native_precisions, set_tf32
from segfit.engine.step import make_update
from segfit.system import cards as driver
from segfit.tasks.segmentation.assembly import make_augment
from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.scores import confusion_matrices
from segfit.tuning.measure import first_window


def cards(*, toy: bool) -> Any:  # noqa: ARG001
    """Return UUID and GiB of each card: by the driver, by torch, and by NVML for the driver's UUID."""
    listed, management = [], []
    for gpu in driver.visible_gpus():
        listed.append([gpu.uuid, gpu.total_gib])
        try:
            nvml, handle = driver.nvml(), gpu.handle()
            gib = nvml.nvmlDeviceGetMemoryInfo(handle).total / GIB
            management.append([_plain(nvml.nvmlDeviceGetUUID(handle)), gib])
        except Exception as error:  # no NVML, or it does not know of memory
            management.append([f"{type(error).__name__}: {error}", 0.0])
    theirs = []
    for number in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(number)
        theirs.append([_plain(one.uuid), one.total_memory / GIB])
    return {"driver": listed, "torch": theirs, "nvml": management}


def _plain(uuid: Any) -> str:
    return str(uuid).lower().removeprefix("gpu-").removeprefix("mig-")


def context(*, toy: bool) -> Any:
    """Return the GiB that are taken after the first tensor, product, convolution, attention and compiled function."""
    side = 64 if toy else 1024
    found = {"nothing": taken()}
    square = torch.ones(side, side, device=DEVICE)
    image, heads = square.view(1, 1, side, side), square.bfloat16().view(1, -1, side, 64)
    steps: dict[str, Callable[[], Any]] = {
        "tensor": lambda: square + 1,
        "product": lambda: square @ square,
        "convolution": lambda: F.conv2d(image, torch.ones(1, 1, 3, 3, device=DEVICE)),
        "attention": lambda: F.scaled_dot_product_attention(heads, heads, heads),
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
    """Return relative errors of the device's fp32 without TF32 against the CPU's fp64.

    Of logits and gradients, in evaluation and in training without dropout; of each loss and its gradient; and the share of
    pixels that the confusion matrix counts elsewhere.
    """
    set_tf32(False)
    still = ["model.dropout=0", *["model.drop_path=0"] * model.startswith("segformer")]
    options, host = [*named(model, toy), *still], torch.device("cpu")
    config = composed(*options, toy=toy)
    assembly, classes = assembly_of(config), config.data.num_classes
    torch.manual_seed(0)
    network, _ = assembly.make_network(config, pretrained=True)
    twin = copy.deepcopy(network).double()
    network = network.to(DEVICE, memory_format=torch.channels_last)
    kinds = ((network, DEVICE, torch.float32), (twin, host, torch.float64))
    images = torch.rand(2, 3, config.image_size, config.image_size)
    targets = torch.randint(0, classes, (2, *images.shape[2:]))
    targets[:, :4] = IGNORE_INDEX
    weigh, found = torch.randn(2, classes, *images.shape[2:]), dict[str, Any]()
    for mode in ("training", "evaluation"):
        values = []
        for net, device, dtype in kinds:
            net.train(mode == "training").zero_grad()
            logits = net(images.to(device, dtype))
            logits.backward(weigh.to(logits))
            gradients = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
            values.append((logits.detach(), torch.cat(gradients)))
        found[mode] = dict(zip(("logits", "gradient"), map(_error, *values), strict=True))
    (ours, _), (theirs, _) = values
    guesses = ours.argmax(1), theirs.argmax(1)
    counts = [
        confusion_matrices(guess, targets.to(guess.device), classes).sum(0).cpu()
        for guess in (*guesses, guesses[0].cpu())
    ]
    share = float((counts[0] - counts[1]).abs().sum() / 2 / counts[1].sum())
    found["confusion"] = {"elsewhere": share, "miscounted": float((counts[0] != counts[2]).sum())}
    for loss in ("ce", "dice_ce", "lovasz_ce", "focal", "tversky"):
        other, values = composed(*options, f"loss={loss}", toy=toy), []
        for _, device, dtype in kinds:
            task, aims = assembly.make_task(other, device), targets.to(device)
            logits = theirs.detach().to(device, dtype, copy=True).requires_grad_()
            value = task.loss(logits, aims, task.totals(aims))
            value.backward()
            values.append((value.detach(), logits.grad))
        found[loss] = dict(zip(("loss", "gradient"), map(_error, *values), strict=True))
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


def rounding(*, toy: bool, model: str) -> Any:
    """Return relative errors of logits in bf16 and fp16, by our forward and the stock one, against fp64.

    What stays fp32 is without TF32.
    """
    set_tf32(False)
    found = {}
    for kind in ("fast", "stock") if model.startswith("segformer") else ("fast",):
        stock = [f"model.fast={str(kind == 'fast').lower()}"] * model.startswith("segformer")
        config = composed(*named(model, toy), *stock, toy=toy)
        torch.manual_seed(0)
        network, _ = assembly_of(config).make_network(config, pretrained=True)
        images = torch.rand(2, 3, config.image_size, config.image_size)
        with torch.no_grad():
            expected = copy.deepcopy(network).double().eval()(images.double())
            network = network.to(DEVICE).eval()
            for precision in [one for one in native_precisions(DEVICE) if one != "fp32"]:
                with Precision(precision, DEVICE.type).autocast():
                    logits = network(images.to(DEVICE))
                found.setdefault(precision, {})[kind] = _error(logits, expected)
    return found


def repeated(*, toy: bool, model: str) -> Any:
    """Say whether two deterministic runs, and one that was resumed in an epoch, have the same weights in bits."""
    sizes = ["batch_size=2", "data.train_size=8", "data.val_size=2", "data.test_size=1"]
    options = [*named(model, toy), *sizes, "deterministic=true", "epochs=2", "max_steps=8"]
    first, second, half = (
        called("train.py", *options, *more, toy=toy)[0] for more in ([], [], ["max_steps=2"])
    )
    called("train.py", f"resume={half}", "max_steps=8", base=())
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
    many = ["data.train_size=8", "max_steps=4"] if toy else ["data.train_size=160", "max_steps=200"]
    run, _ = called(
        "train.py", *named("cnn", toy), f"precision={precision}", "image_size=96", "batch_size=16", "lr=1e-3",
        "data.cache=ram", "data.val_size=16", "epochs=100", "val_every=100", *many, toy=toy,
    )  # fmt: skip
    metrics = read(run / "metrics.json")
    return {name: metrics[name] for name in ("best", "precision", "seconds", "updates")}
