import pytest

from segfit.tasks.segmentation.classes import sided_pairs


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("l_eye", "r_eye"), ("eye_l", "eye_r"), ("eye.L", "eye.R"), ("L ear", "R ear"), ("EyeL", "EyeR"),
        ("left lung", "right lung"), ("Lung-Left", "Lung-Right"), ("auge_links", "auge_rechts"),
        ("linke Hand", "rechte Hand"), ("左眼", "右眼"), ("rein gauche", "rein droite"), ("l", "r"), ("leftEye", "rightEye"),
    ],
)  # fmt: skip
def test_classes_that_differ_by_side_are_found(left: str, right: str) -> None:
    assert list(sided_pairs(["background", right, "nose", left])) == [(3, 1)]


def test_others_are_not() -> None:
    names = [
        "load",
        "road",
        "led",
        "red",
        "neck_l",
        "neck",
        "ear_r",
        "u_lip",
        "l_lip",
        "left",
        "lamp",
        "ramp",
    ]
    assert list(sided_pairs(names)) == []
