"""Everything that is wrong with values is listed at once."""

import pytest
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from segfit.config.check import check
from segfit.errors import SegFitError
from segfit.tasks.segmentation.data.schema import label_map_of
from segfit.tasks.segmentation.schema import size_of
from tests.unit.composing import composed

FOLDER = ("data=folder", "data.root=x", "data.num_classes=3")


def problems(*overrides: str) -> list[str]:
    with pytest.raises(SegFitError) as caught:
        check(composed("hardware=cpu", *overrides))
    return caught.value.problems


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["batch_size=0"], "batch_size=0: must be at least 1"),
        (["lr=0"], "lr=0.0: must be more than 0"),
        (["augmentation.hflip=1.5"], "must be at most 1"),
        (["model=cnn", "model.dropout=1"], "must be less than 1"),
        (["device=gpu"], "must be one of auto, cpu, cuda, mps"),
        (["monitor=mioo"], "Did you mean 'miou'?"),
        (["data=folder", "data.num_classes=3"], "data.root has no value"),
        (["lr=inf"], "lr=inf: must be a finite number"),
        (["optimizer.weight_decay=nan"], "must be a finite number"),
        (["data.std=[1,1,inf]"], "must be a finite number"),
        (["seed=99999999999"], "must be at most 4294967295"),
        (["~lr"], "lr: cannot be taken out"),
        (["model.name=cnn"], "model.name=cnn: cannot be set; choose by model=…"),
        (["data.name=folder"], "data.name=folder: cannot be set"),
        (["image_size=16"], "image_size=16"),
        (["image_size=20000"], "at most 16384"),
        (["image_size={64: 64, 65: 65}"], "image_size={64: 64, 65: 65}"),
        (["image_size=[64,64,64]"], "image_size=[64, 64, 64]"),
        (["image_size=large"], "image_size=large"),
        (["augmentation.scale=[1.2,0.8]"], "must be [low, high]"),
        (["augmentation.mixup=0.7", "augmentation.cutmix=0.7"], "at most 1 together"),
        (["data.mean=[0.5]"], "three numbers"),
        (["optimizer.betas=[0.9]"], "two or three numbers"),
        (["data.class_names=[a,b]"], "2 entries for num_classes=4"),
        (["data.class_names=[a,b,a,c]"], "'a' is no name, or that of two classes"),
        (["data.class_names=[a,b,'',c]"], "'' is no name"),
        (["data.class_colors=[[0,0,0],[1,1,1],[2,2,2],[3,3,300]]"], "no RGB triple"),
        (["data.background=4"], "below num_classes=4"),
        (["augmentation.swap=[[1,4]]"], "must be pairs of classes (0 to 3)"),
        (["augmentation.swap=[[1,2],[2,3]]"], "each class in one of them at most"),
        (["augmentation.swap=[[1,2,3]]"], "must be pairs of classes"),
        (["loss.class_weights=balancd"], "Did you mean 'balanced'?"),
        (["loss.class_weights=[1,2]"], "none, balanced or 4 numbers"),
        (["loss.class_weights=[true,1,1,1]"], "none, balanced or 4 numbers"),
        (["loss.class_weights=[0,0,0,0]"], "nothing would be learnt"),
        (
            ["loss=tversky", "loss.tversky_alpha=0", "loss.tversky_beta=0"],
            "0 whatever is predicted",
        ),
        (["loss.class_weights=3"], "none, balanced or 4 numbers"),
        (["data.num_classes=5", "data.class_names=null", "data.class_colors=null"], "always has 4"),
        (["patience=50", "epochs=10"], "can never stop"),
        (["compile_mode=reduce-overhead"], "need compile=true"),
        (["compile_mode=reduce-overhead", "compile=true", "device=cpu"], "need compile=true"),
        (["compile_mode=reduce-overhead", "compile=true", "accumulate=4"], "and accumulate=1"),
        (["loss=tversky", "loss.label_smoothing=0.3"], "take loss=ce or loss=dice_ce or"),
        (["loss=ce", "loss.region_weight=0.2"], "take loss=dice_ce or loss=lovasz_ce"),
        (
            ["loss=dice", "loss.focal_gamma=1"],
            "no effect with loss=dice. Leave it away, or take loss=focal",
        ),
        (["loss.balance=1"], "take loss.class_weights=balanced"),
        (["scheduler=cosine", "scheduler.step_gamma=0.5"], "take scheduler=step"),
        (["scheduler.warmup_factor=0.5"], "take scheduler.warmup above 0"),
        (["precision=bf16", "precision.init_scale=8"], "take precision=auto or precision=fp16"),
        (
            ["augmentation=none", "augmentation.hflip=1"],
            "augmentation=cpu or augmentation=kornia-gpu",
        ),
        (["augmentation.mixup_alpha=2"], "take augmentation.mixup above 0"),
        (
            ["augmentation.blur=0", "augmentation.blur_sigma=[1,9]"],
            "take augmentation.blur above 0",
        ),
        (["task=restoration", "loss=mse", "loss.epsilon=0.1"], "take loss=charbonnier"),
        (["task=restoration", "loss.encoder=resnet18"], "take loss.perceptual above 0"),
        (["task=restoration", "degrade=blur", "degrade.length=9"], "take degrade.kind=motion"),
        (["task=forecasting", "loss=mae", "loss.delta=2"], "take loss=huber"),
        ([*FOLDER, "data.label_map={0:0,7:3}"], "7 → 3 is not two whole numbers: a mask value"),
        ([*FOLDER, "data.label_map={0:liver}"], "two whole numbers"),
        ([*FOLDER, "data.label_map={0:true}"], "two whole numbers"),
        ([*FOLDER, "data.label_map={-70000:0}"], "-70000 → 0 is not two whole numbers"),
        ([*FOLDER, "+data.label_map.x=0"], "x → 0 is not two whole numbers"),
        ([*FOLDER, "data.label_map={0:1}", "data.mask_format=parts"], "need data.mask_format=png"),
        ([*FOLDER[::2], "data.root="], "data.root is empty"),
        ([*FOLDER[::2], r"data.root='a\${b}'"], "data.root=a${b}: must not hold ${"),
        ([*FOLDER, "data.label_map=3"], "must be {mask value: class, …}"),
        ([*FOLDER, "data.split.group='('"], "no valid regular expression"),
        ([*FOLDER, "data.split.val=0.6", "data.split.test=0.5"], "leave something to train on"),
        ([*FOLDER, "data.split.fold=5"], "must be less than data.split.folds=5"),
        ([*FOLDER, "data.split.fold=3", "data.split.folds=3"], "must be less than"),
        ([*FOLDER, "data.split.folds=5"], "no effect without data.split.fold"),
        (
            [*FOLDER, "data.split.lists=L", "data.split.fold=1"],
            "fold=1: has no effect with data.split.lists",
        ),
        ([*FOLDER, "data.split.lists=L", "data.split.val=0.3"], "val=0.3: has no effect"),
        ([*FOLDER, "data.window=[1,99]", "data.value_range=[0,9]"], "are two answers"),
        ([*FOLDER, "data.value_range=[9,0]"], "must be auto, percentiles or [low, high]"),
        ([*FOLDER, "data.value_range=wide"], "must be auto, percentiles or [low, high]"),
    ],
)
def test_one_problem(overrides: list[str], part: str) -> None:
    (problem,) = problems(*overrides)
    assert part in problem


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["run=x", "export=a.pt2", "images=b"], "export writes the model alone"),
        (["run="], "run is empty"),
        (["run=x", "images="], "images is empty"),
        (["run=x", "compare=y", "bootstrap=0"], "compare needs resamples"),
        (["run=x", "compare=y", "images=b"], "Leave export and images out"),
        (["run=x", "metrics.boundary=-1"], "must be at least 0"),
        (["run=x", "temperature=0"], "must be fit or a number above 0"),
        (["run=x", "temperature=fit", "split=test"], "fitted on split=val alone"),
    ],
)
def test_options_of_evaluation_have_to_agree(overrides: list[str], part: str) -> None:
    with pytest.raises(SegFitError, match=part):
        check(composed(*overrides, name="evaluate"))


def test_all_problems_at_once() -> None:
    found = problems("batch_size=0", "lr=-1", "device=gpu", "augmentation.blur=2")
    assert [problem.split("=")[0] for problem in found] == [
        "batch_size", "lr", "device", "augmentation.blur",
    ]  # fmt: skip


def test_a_problem_explains_the_option() -> None:
    assert "(Peak learning rate.)" in problems("lr=0")[0]


def test_an_option_that_yaml_brings_may_lose_its_effect_by_what_is_typed(monkeypatch) -> None:
    def typed(*overrides: str) -> None:
        hydra = OmegaConf.structured({"hydra": HydraConf()})
        hydra.hydra.overrides.task = list(overrides)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", hydra)
        check(composed("hardware=cpu", *overrides))

    typed("experiment=camvid", "data.root=x", "augmentation=none", "loss.class_weights=none")
    with pytest.raises(SegFitError, match=r"augmentation.hflip=0.5: has no effect") as caught:
        typed("augmentation=none", "augmentation.hflip=0.5", "loss=ce", "loss.focal_gamma=2.0")
    assert len(caught.value.problems) == 2


def test_a_recorded_run_may_have_options_without_effect() -> None:
    check(composed("loss=dice", "loss.label_smoothing=0.3"), recorded=True)


def test_good_values_pass() -> None:
    check(composed("hardware=8gb", *FOLDER, "data.label_map={0:0,9:255}", "image_size=[64,96]"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data=membrane", "data.label_map={0: 0, 1: 1}"], {0: 0, 1: 1}),
        (["data=membrane", "+data.label_map.1=1"], {0: 0, 255: 1, 1: 1}),
        (["data=membrane", "data.label_map=null"], None),
        ([*FOLDER, "data.label_map={0: 255, 1: 0}", "data.ignore_index=null"], {0: 255, 1: 0}),
        ([*FOLDER, "data.label_map={-1: 255, 0: 0}", "data.ignore_index=-1"], {-1: 255, 0: 0}),
    ],
)
def test_a_map_is_the_one_that_is_typed(overrides, expected) -> None:
    config = composed("hardware=cpu", "data.root=x", *overrides)
    check(config)
    assert label_map_of(config.data) == expected


@pytest.mark.parametrize(
    "root",
    ["1e3", "007", "2024_01", "~/x", "a b (1)", "a,b", "it's", "C:\\new\\", "a=b", "ü{1}", "x#y"],
)
def test_a_folder_may_be_called_anything(root) -> None:
    assert composed("data=folder", f"data.root={root}").data.root == root


def test_names_of_classes_stay_as_they_are_typed() -> None:
    data = composed("data=shapes", "data.class_names=[1e3, true,01,two words]").data
    assert data.class_names == ["1e3", "true", "01", "two words"]


@pytest.mark.parametrize(("given", "size"), [(64, (64, 64)), ([48, 96], (48, 96))])
def test_size_of(given: int | list[int], size: tuple[int, int]) -> None:
    assert size_of(given) == size
