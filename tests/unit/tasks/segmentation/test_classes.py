import pytest

from segfit.tasks.segmentation.classes import sided_pairs


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("l_eye", "r_eye"), ("eye_l", "eye_r"), ("eye.L", "eye.R"), ("L ear", "R ear"), ("EyeL", "EyeR"),
        ("left lung", "right lung"), ("Lung-Left", "Lung-Right"), ("auge_links", "auge_rechts"),
        ("linke Hand", "rechte Hand"), ("左眼", "右眼"), ("rein gauche", "rein droite"), ("l", "r"), ("leftEye", "rightEye"),
        ("œil gauche", "œil droit"), ("olho esquerdo", "olho direito"), ("левый глаз", "правый глаз"),
        ("lewe oko", "prawe oko"), ("vänster öga", "höger öga"), ("venstre øye", "højre øye"), ("sol göz", "sağ göz"),
        ("왼쪽 눈", "오른쪽 눈"), ("lung_lt", "lung_rt"), ("lhs", "rhs"), ("lkidney", "rkidney"), ("eye_sx", "eye_dx"),
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
        "lear",
        "rear",
        "solar",
        "sağar",
        "lamp",
        "ramp",
    ]
    assert list(sided_pairs(names)) == []
