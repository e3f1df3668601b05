"""Data sources, the .npz format and its errors, batches of ragged sequences."""

import numpy as np
import pytest
import torch

from models.batch import Target
from models.data import SOURCES, DataConfig, Dataset, Modality, generate, load, load_digits, load_npz, load_utd_mhad
from models.data.utd_mhad import HIP_CENTRE, SHOULDER_CENTRE, default_path, normalise_skeletons


def arrays(rows=30):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 6, rows)
    return {
        "pose": rng.normal(size=(lengths.sum(), 3)),
        "off_pose": np.concatenate([[0], lengths.cumsum()]),
        "text": rng.normal(size=(rows, 4)),
        "y": np.arange(rows) % 3,
        "split": np.arange(rows) // 3 % 3,
    }


def write(tmp_path, **changes):
    content = arrays() | changes
    path = tmp_path / "data.npz"
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


def test_digits_are_two_halves_with_a_stratified_split():
    data = load_digits(seed=3)
    assert [m.dim for m in data.modalities] == [32, 32] and data.target.size == 10
    for split, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        counts = data.labels[data.rows(split)].bincount()
        assert ((counts / data.labels.bincount() - share).abs() < 0.02).all()
    assert not torch.equal(data.split, load_digits(seed=4).split)


def test_an_npz_file_gives_ragged_and_plain_modalities(tmp_path):
    data = load_npz(write(tmp_path))
    assert [m.is_sequence for m in data.modalities] == [True, False] and data.target.size == 3
    source = arrays()
    x = data["pose"].take(torch.tensor([4, 7]))
    assert x.lengths.tolist() == np.diff(source["off_pose"])[[4, 7]].tolist()
    assert x.values.shape[1] == x.lengths.max()
    for row, length in zip(x.values, x.lengths, strict=True):
        assert (row[length:] == 0).all()


def test_three_dimensional_arrays_and_drawn_splits_work(tmp_path):
    data = load_npz(write(tmp_path, pose=np.ones((30, 7, 2)), off_pose=None, split=None), seed=1)
    assert data["pose"].take(torch.arange(3)).lengths.tolist() == [7, 7, 7]
    assert all(len(data.rows(split)) for split in ("train", "valid", "test"))


BROKEN = {
    "no labels": ({"y": None}, "no labels y"),
    "wrong rows": ({"text": np.ones((29, 4))}, "29 rows"),
    "not finite": ({"text": np.full((30, 4), np.nan)}, "not finite"),
    "offsets too short": ({"off_pose": np.arange(31)}, "off_pose"),
    "split length": ({"split": np.zeros(3, int)}, "split must be"),
    "split codes": ({"split": np.full(30, 5)}, "split must be"),
    "no train rows": ({"split": np.ones(30, int)}, "no train rows"),
    "real labels": ({"y": np.linspace(0, 1, 30)}, "integer class labels"),
    "one class": ({"y": np.zeros(30)}, "two classes"),
    "label matrix": ({"y": np.zeros((30, 2))}, "one class label per row"),
    "objects": ({"text": np.array([{}] * 30, dtype=object)}, "pickle"),
}


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.replace(" ", "-"))
def test_a_broken_file_is_explained(tmp_path, case):
    changes, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        load_npz(write(tmp_path, **changes))


def test_truncated_missing_and_unknown_sources_are_explained(tmp_path):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="not a complete"):
        load_npz(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_npz(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="data must be"):
        load(DataConfig("cifar"))
    with pytest.raises(ValueError, match="different names out of pose, text"):
        load(DataConfig(str(write(tmp_path)), ("smell", "text")))
    with pytest.raises(ValueError, match=r"data.target must be left empty for 'digits'"):
        load(DataConfig("digits", target="mood"))


def test_every_modality_of_a_file_is_there_and_a_length_of_zero_is_a_missing_one(tmp_path):
    offsets = np.r_[0, 0, np.arange(1, 30)]
    data = load_npz(write(tmp_path, pose=np.ones((29, 3)), off_pose=offsets, third=np.ones((30, 2))))
    assert data.names == ("pose", "text", "third")
    assert data["pose"].has().tolist() == [False] + [True] * 29


def test_a_threshold_makes_two_classes_of_a_regression_target(monkeypatch):
    values = torch.linspace(-1, 1, 9)
    source = Dataset("s", (Modality("x", values[:, None]),), values, Target.regression(), torch.arange(9) % 3)
    monkeypatch.setitem(SOURCES, "line", lambda seed: source)
    found = load(DataConfig("line", threshold=0))
    assert found.target.size == 2 and found.labels.tolist() == (values > 0).long().tolist()
    with pytest.raises(ValueError, match="threshold needs a regression target"):
        load(DataConfig("digits", threshold=0))


def test_synthetic_views_share_their_latents_and_balance_the_classes():
    data = generate(2000, seed=1)
    assert [m.values.shape for m in data.modalities] == [(2000, 100)] * 2
    first, second = (m.values for m in data.standardised().modalities)
    assert 0.4 < data.labels.float().mean() < 0.6
    assert torch.linalg.matrix_rank(first - first.mean(0), atol=1e-2) <= 16
    joint = torch.cat([first, second], 1)
    assert torch.linalg.matrix_rank(joint - joint.mean(0), atol=1e-2) == 22
    assert generate(100, labels="planar_flow").target.size == 20
    with pytest.raises(ValueError, match="label_dims"):
        generate(100, label_dims=(11, 6, 6))


def test_normalised_skeletons_forget_place_and_size_of_a_person():
    generator = torch.Generator().manual_seed(0)
    frames, offsets = torch.randn(9, 20, 3, generator=generator), torch.tensor([0, 4, 9])

    def normalised(joints):
        return normalise_skeletons(Modality("skeleton", joints.flatten(1), offsets)).values.reshape(9, 20, 3)

    moved = frames.clone()
    moved[4:] = moved[4:] * 1.7 + torch.tensor([3.0, -1.0, 2.0])
    expected = normalised(frames)
    torch.testing.assert_close(normalised(moved), expected)
    assert (expected[:, HIP_CENTRE] == 0).all()
    torso = expected[:, SHOULDER_CENTRE].norm(dim=1)
    torch.testing.assert_close(torch.stack([torso[:4].mean(), torso[4:].mean()]), torch.ones(2))


@pytest.mark.skipif(not default_path().is_file(), reason="utd_mhad.npz is absent: set MI_KERNELS_DATA")
def test_utd_mhad_keeps_its_split():
    data = load_utd_mhad()
    assert [len(data.rows(split)) for split in ("train", "valid", "test")] == [323, 108, 430]
    batch = data.batch(data.rows("train")[:4])
    skeleton, inertial = batch.inputs["skeleton"], batch.inputs["inertial"]
    assert skeleton.values.shape[2] == 60 and inertial.values.shape[2] == 6
    assert not torch.equal(skeleton.lengths, inertial.lengths)
