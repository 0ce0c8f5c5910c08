"""A checkpoint is whole or not there, and what is read cannot do harm."""

import os
import pickle
import stat
import zipfile
from pathlib import Path

import pytest
import torch

from segfit.engine.checkpoint import Checkpoints, DamagedCheckpointError, load_checkpoint
from segfit.errors import SegFitError
from tests.unit.payload import Payload

STATE = {"model": {"weight": torch.arange(6.0)}, "progress": {"epoch": 3}}


@pytest.fixture
def saved(tmp_path) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save_last(STATE)
    return checkpoints


def files(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.last.parent.iterdir())


def test_what_was_saved_is_read(saved):
    loaded = load_checkpoint(saved.last)
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
    assert loaded["progress"] == {"epoch": 3}
    assert files(saved) == ["last.pt"]


def test_best_holds_weights_scores_and_epoch(saved):
    saved.save_best(STATE["model"], {"miou": 0.5}, 2)
    best = load_checkpoint(saved.best)
    assert (best["scores"], best["epoch"]) == ({"miou": 0.5}, 2)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("short")])
def test_a_failed_save_keeps_the_old_one_and_leaves_nothing(saved, monkeypatch, error):
    def save_half(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(SegFitError, match=r"cannot save .*last\.pt.*before it is kept"):
        saved.save_last({"model": {}})
    monkeypatch.undo()
    assert load_checkpoint(saved.last)["progress"] == {"epoch": 3}
    assert files(saved) == ["last.pt"]


def test_ctrl_c_while_saving_keeps_the_old_one_and_leaves_nothing(saved, monkeypatch):
    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved.save_last({"model": {}})
    assert load_checkpoint(saved.last)["progress"] == {"epoch": 3}
    assert files(saved) == ["last.pt"]


def test_what_a_killed_process_left_is_cleared_by_the_next_save(saved):
    (saved.last.parent / ".last.pt.12345-6.partial").write_bytes(b"half")
    saved.save_last(STATE)
    assert files(saved) == ["last.pt", "previous.pt"]


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(SegFitError, match="cannot save"):
        Checkpoints(tmp_path / "file").save_last({})


def flip_a_bit(path: Path) -> None:
    """Change one bit in the middle of the tensor's numbers, as a disk does that goes bad."""
    content = bytearray(path.read_bytes())
    at = content.index(STATE["model"]["weight"].numpy().tobytes()) + 9
    content[at] ^= 1
    path.write_bytes(content)


def test_a_bit_that_flipped_is_noticed(saved):
    """torch itself loads it without a word."""
    flip_a_bit(saved.last)
    changed = torch.load(saved.last, weights_only=True)["model"]["weight"]
    assert not torch.equal(changed, STATE["model"]["weight"])
    with pytest.raises(DamagedCheckpointError, match=r"last\.pt: damaged"):
        load_checkpoint(saved.last)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(saved, damage):
    saved.save_last({**STATE, "progress": {"epoch": 4}})
    assert saved.load_last()[0]["progress"] == {"epoch": 4}
    damage(saved.last)
    content, notice = saved.load_last()
    assert content["progress"] == {"epoch": 3}
    assert str(saved.last) in notice
    assert "Resuming from the one before it, previous.pt" in notice


def test_the_next_save_keeps_the_one_before_rather_than_the_damaged_one(saved):
    saved.save_last({**STATE, "progress": {"epoch": 4}})
    cut(saved.last)
    assert saved.load_last()[0]["progress"] == {"epoch": 3}
    saved.save_last({**STATE, "progress": {"epoch": 5}})
    progress = [load_checkpoint(path)["progress"] for path in (saved.previous, saved.last)]
    assert progress == [{"epoch": 3}, {"epoch": 5}]
    saved.save_last({**STATE, "progress": {"epoch": 6}})
    assert load_checkpoint(saved.previous)["progress"] == {"epoch": 5}


def test_where_both_are_damaged_it_says_so(saved):
    saved.save_last(STATE)
    cut(saved.last)
    cut(saved.previous)
    with pytest.raises(DamagedCheckpointError, match=r"previous\.pt"):
        saved.load_last()


def test_a_refused_checkpoint_does_not_fall_back(saved, tmp_path):
    saved.save_last(STATE)
    proof = tmp_path / "executed"
    torch.save({"format": 3, "model": Payload(proof)}, saved.last)
    with pytest.raises(SegFitError, match="refused"):
        saved.load_last()
    assert not proof.exists()


def test_a_foreign_checkpoint_does_not_fall_back(saved):
    saved.save_last(STATE)
    torch.save({"state_dict": STATE["model"]}, saved.last)
    with pytest.raises(SegFitError, match=r"last\.pt: not a checkpoint of this version"):
        saved.load_last()


class Disk:
    """What a power cut would leave of a folder: the names, and of each file's content what was flushed.

    Attributes:
        cuts: name → content, at every moment at which one of the two changed.
        named: whether the names were flushed too since they changed last.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.cuts: list[dict[str, bytes]] = []
        self.named = True
        self._flushed: dict[int, bytes] = {}
        self._fsync, self._replace = os.fsync, Path.replace
        monkeypatch.setattr(os, "fsync", self._flush)
        monkeypatch.setattr(Path, "replace", lambda path, target: self._rename(path, target))

    def cut(self) -> None:
        there = [(path.name, path.stat().st_ino) for path in self.folder.iterdir()]
        self.cuts.append({name: self._flushed.get(number, b"") for name, number in there})

    def _flush(self, handle: int) -> None:
        self.cut()
        self._fsync(handle)
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            self.named = True
        else:
            (path,) = (p for p in self.folder.iterdir() if p.stat().st_ino == status.st_ino)
            self._flushed[status.st_ino] = path.read_bytes()
        self.cut()

    def _rename(self, path: Path, target: Path) -> Path:
        self.named = False
        renamed = self._replace(path, target)
        self.cut()
        return renamed


def test_a_power_cut_while_saving_leaves_this_or_the_last_state(tmp_path, monkeypatch):
    checkpoints, after = Checkpoints(tmp_path / "a"), Checkpoints(tmp_path / "b")
    after.last.parent.mkdir()
    disk = Disk(checkpoints.last.parent, monkeypatch)
    for number in range(4):
        disk.cuts.clear()
        checkpoints.save_last({**STATE, "number": number})
        assert disk.named
        assert len(disk.cuts) >= 5
        for cut in disk.cuts if number else ():
            for path in after.last.parent.iterdir():
                path.unlink()
            for name, content in cut.items():
                (after.last.parent / name).write_bytes(content)
            assert after.load_last()[0]["number"] in (number - 1, number)
    assert checkpoints.load_last()[0]["number"] == 3


def test_killed_between_two_renames_leaves_the_one_before(saved, monkeypatch):
    replace = Path.replace

    def die(self, target):
        if Path(target) == saved.last:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        saved.save_last({**STATE, "progress": {"epoch": 4}})
    monkeypatch.undo()
    assert not saved.last.exists()
    assert saved.exist()
    assert saved.load_last()[0]["progress"] == {"epoch": 3}


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_checkpoint_that_carries_code_is_refused_unrun(tmp_path, how):
    path, proof = tmp_path / "last.pt", tmp_path / "executed"
    content = {"format": 3, "model": Payload(proof)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(SegFitError, match="refused"):
        load_checkpoint(path)
    assert not proof.exists()


def test_a_damaged_checkpoint_is_refused_wherever_the_damage_is(saved, tmp_path):
    whole = saved.last.read_bytes()
    path = tmp_path / "damaged.pt"
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SegFitError, match=r"damaged\.pt"):
            load_checkpoint(path)
    path.write_bytes(b"\x00" * len(whole))
    with pytest.raises(SegFitError, match=r"damaged\.pt"):
        load_checkpoint(path)


def test_a_bit_that_flipped_anywhere_is_noticed_or_changes_nothing(saved, tmp_path):
    """Names, sizes, the pickle: what damage makes of them fails in many ways, each of them reported."""
    whole = saved.last.read_bytes()
    path = tmp_path / "damaged.pt"
    noticed = 0
    for bit in range(0, 8 * len(whole), 7):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            loaded = load_checkpoint(path)
        except SegFitError:
            noticed += 1
        else:
            assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
            assert loaded["progress"] == STATE["progress"]
    assert noticed > len(whole) / 4


def test_compressed_parts_are_refused(saved, tmp_path):
    """A few kilobytes may unpack to any size."""
    path = tmp_path / "bomb.pt"
    with (
        zipfile.ZipFile(saved.last) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    with pytest.raises(SegFitError, match="compressed parts"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [{"weight": torch.ones(2)}, [1, 2], {"format": 99, "model": {}}]
)
def test_a_foreign_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "foreign.pt")
    with pytest.raises(SegFitError, match="not a checkpoint of this version"):
        load_checkpoint(tmp_path / "foreign.pt")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(SegFitError, match=r"none\.pt: there is no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
