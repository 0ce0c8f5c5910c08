"""A model by name, and the pretrained weights that it starts from: a file, a folder, the Hugging Face cache or the hub.

Each builder is imported when it is asked for: transformers and timm take seconds. Loading never runs code from a checkpoint
(safetensors, or `torch.load(weights_only=True)`), and never hangs without a network: the cache is asked first, then the
hub's reachability, for three seconds.
"""

import contextlib
import io
import json
import logging
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from segfit.errors import SegFitError

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of RGB in 0-1
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # in order of preference
PROBE_SECONDS = 3.0
_OFFLINE = (
    "On a machine with a network run `hf download {0}`, copy its folder to this one, and give "
    "model.weights=<that folder>; or copy its cache to $HF_HOME."
)


@dataclass(frozen=True)
class Weights:
    """Which weights a model starts from."""

    source: str = "random"  # or a hub name or a path
    warning: str = ""  # pretrained ones were wanted and could not be had; what to do


@dataclass(frozen=True)
class Exported:
    """What is exported of a model."""

    module: nn.Module  # of torch.export's program
    inputs: Mapping[str, Tensor]  # examples by name; the first dimension counts samples
    files: Mapping[str, str]  # texts that go with it, by name
    sizes: int = 0  # how many of the inputs' last dimensions may have any size
    outputs: Sequence[str] = ("outputs",)  # names of what the ONNX file returns
    onnx: nn.Module | None = None  # of the ONNX file; None: the same module


def make_model(
    class_names: Sequence[str], options: Mapping[str, Any], *, pretrained: bool, channels: int = 3
) -> tuple[nn.Module, Weights]:
    """Return a model (B, channels, H, W) → (B, len(class_names), H, W) and which weights it has.

    `options` are the fields of the model's config; without `pretrained`, as when a checkpoint follows, its `weights` are not
    looked for. A pretrained first convolution is spread over other `channels` than three as timm does it
    (`timm.models.adapt_input_conv`): its weights for R, G and B in turn, times 3 / channels. Raises a SegFitError if weights
    that were named cannot be loaded.
    """
    values = {**options, "channels": channels}
    name = values.pop("name")
    if name == "cnn":
        from segfit.models.cnn import CNN

        return CNN(len(class_names), **values), Weights()
    if not pretrained:
        values["weights"] = None
    if name == "segformer":
        from segfit.models.segformer import make_segformer

        return make_segformer(num_classes=len(class_names), class_names=class_names, **values)
    from segfit.models.timm_unet import TimmUnet

    model = TimmUnet(num_classes=len(class_names), **values)
    return model, model.weights


def normalisation(options: Mapping[str, Any]) -> tuple[str, Normalisation | None]:
    """Return which weights a model starts from, and the mean and std that they were made for; None: nobody says.

    What lies beside the weights counts more than what timm knows of an encoder of this name. `options` as for `make_model`;
    raises a SegFitError as it does.
    """
    weights, encoder = options.get("weights"), options.get("encoder")
    if weights not in (None, "auto"):
        file, _ = find(weights, None, "")
        if file and (found := recorded_normalisation(file)):
            return weights, found
    if encoder is None:
        return options["name"], None
    from timm import get_pretrained_cfg, is_model

    known = get_pretrained_cfg(encoder) if is_model(encoder) else None
    return encoder, known and (known.mean, known.std)


def for_inference(model: nn.Module) -> nn.Module:
    """Return the model in the form that computes least, in eval mode; a SegFormer's decode head is merged."""
    from segfit.models.segformer import SegFormer, merge

    return merge(model) if isinstance(model, SegFormer) else model.eval()


def find(weights: str | None, recommended: str | None, model: str) -> tuple[Path | None, Weights]:
    """Return the file of a model's weights, None for random ones, and what they are.

    `weights` may be "auto", the `recommended` hub checkpoint (None: there is none) from cache or hub, else random ones; or
    None: random ones. What else is named, a file, a folder or a name on the hub, has to be there. `model` is what they are
    for. Raises a SegFitError if weights that were named cannot be had, or are no checkpoint.
    """
    if weights is None:
        return None, Weights()
    auto = weights == "auto"
    name = (recommended or model) if auto else weights
    local = Path(name).expanduser()
    path: Path | str = local
    if auto or not local.exists():
        if not auto and not re.fullmatch(r"[^./~][^/]*/[^/]+", name):
            raise SegFitError(
                f"model.weights={name}: no such file or folder, and no hub name (owner/name) either. "
                "Give an existing path, a hub name, auto, or null for random weights."
            )
        missing = auto and recommended is None
        path = "there is no hub checkpoint of it" if missing else hub_checkpoint(name)
    if isinstance(path, str) and auto:
        return None, Weights(
            warning=f"WARNING: RANDOM WEIGHTS. The pretrained {name} could not be had: {path}. Scores will be "
            f"far lower, and training far longer, than with pretrained weights. {_OFFLINE.format(name)} "
            "If random weights are what you want, say model.weights=null.",
        )
    if isinstance(path, str):
        raise SegFitError(
            f"model.weights={name}: {path}. {_OFFLINE.format(name)} Or take model.weights=null: random weights."
        )
    if path.is_dir():
        files = [path / file for file in WEIGHT_FILES if (path / file).exists()]
        if not files:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise SegFitError(
                f"model.weights={path}: no checkpoint there ({' or '.join(WEIGHT_FILES)}); found {found}."
            )
        path = files[0]
    return path, Weights(name)


def hub_checkpoint(repo: str) -> Path | str:
    """Return the local folder of hub checkpoint `repo` (owner/name), fetched if need be, or why it cannot be had.

    Honours HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_ENDPOINT and the proxy variables.
    """
    from huggingface_hub import constants

    if folder := _fetched(repo, local_files_only=True):
        return folder
    where = f"not in the cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        return f"{where}, and HF_HUB_OFFLINE is set"
    # The very file: a hub may answer for itself and be silent about files, which its client waits minutes for.
    if reason := unreachable(f"{constants.ENDPOINT}/{repo}/resolve/main/config.json"):
        return f"{where}, and {constants.ENDPOINT} cannot be reached ({reason})"
    try:
        folder = _fetched(repo, etag_timeout=5)
    except Exception as error:  # the hub's client changes its HTTP library, and its errors
        return f"{where}, and the hub answers: {[*str(error).strip().splitlines(), repr(error)][0]}"
    return folder or f"the hub's {repo} holds none of {', '.join(WEIGHT_FILES)}"


def _fetched(repo: str, **options: Any) -> Path | None:
    """Return the folder of a checkpoint that `hf_hub_download` got with these options; None: it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in WEIGHT_FILES:
        with quiet(), contextlib.suppress(EntryNotFoundError):
            hf_hub_download(repo, file, **options)
            return Path(hf_hub_download(repo, "config.json", **options)).parent
    return None


def unreachable(url: str) -> str | None:
    """Return why the hub does not answer to `url` within three seconds, or None if it does, whatever it answers.

    The hub's own client is asked, so proxies and certificates count as they will for the download.
    """
    from huggingface_hub import get_session

    outcome: list[str | None] = []

    def probe() -> None:
        try:
            get_session().head(url, timeout=PROBE_SECONDS)
            outcome.append(None)
        except Exception as error:
            outcome.append(str(error) or type(error).__name__)

    # A thread, because no HTTP client bounds the time of name resolution.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return outcome[0] if outcome else f"no answer in {PROBE_SECONDS:g} s"


def recorded_normalisation(weights: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and std that files of the hub's beside a file of weights name; None without such files."""
    known = {
        "preprocessor_config.json": ("image_mean", "image_std"),
        "config.json": ("mean", "std"),
    }
    for file, keys in known.items():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            values = json.loads(weights.with_name(file).read_text("utf-8"))
            values = values.get("pretrained_cfg", values)  # timm's
            mean, std = (tuple(float(number) for number in values[key]) for key in keys)
            if len(mean) == len(std) == 3:
                return mean, std
    return None


def check_keys(file: Path, what: str, remedy: str, **wrong: Collection[str]) -> None:
    """Raise a SegFitError with the remedy if a file that should hold the weights of `what` has wrong keys.

    `wrong` says what is wrong with them, with _ for spaces: missing=keys.
    """
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(sorted(keys)[:5])}{' …' if len(keys) > 5 else ''} ({len(keys)})"
        for kind, keys in wrong.items()
        if keys
    ]
    if problems:
        raise SegFitError(
            f"model.weights={file}: not the weights of {what}. Keys {'; '.join(problems)}. {remedy}"
        )


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of safetensors or of `torch.save`; raise a SegFitError for any other, and for one with code."""
    try:
        state: object
        if file.suffix == ".safetensors":
            state = safetensors.torch.load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, torch and safetensors fail in many ways over damage
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SegFitError(f"model.weights={file}: not a readable checkpoint ({reason}).") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SegFitError(f"model.weights={file}: not a state dict (parameter name → tensor).")
    return state


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and progress bars of transformers and huggingface_hub: the report says it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
