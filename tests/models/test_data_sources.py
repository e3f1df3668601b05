"""Data sources, the .npz format and its errors, batches of ragged sequences."""

import numpy as np
import pytest
import torch

from models.data import Modality, generate, load, load_digits, load_npz, load_utd_mhad
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
    assert data.first.dim == data.second.dim == 32 and data.num_classes == 10
    for split, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        counts = data.y[data.rows(split)].bincount()
        assert ((counts / data.y.bincount() - share).abs() < 0.02).all()
    assert not torch.equal(data.split, load_digits(seed=4).split)


def test_an_npz_file_gives_ragged_and_plain_modalities(tmp_path):
    data = load_npz(write(tmp_path))
    assert data.first.is_sequence and not data.second.is_sequence and data.num_classes == 3
    source = arrays()
    x = data.first.take(torch.tensor([4, 7]))
    assert x.lengths.tolist() == np.diff(source["off_pose"])[[4, 7]].tolist()
    assert x.values.shape[1] == x.lengths.max()
    for row, length in zip(x.values, x.lengths, strict=True):
        assert (row[length:] == 0).all()


def test_statistics_come_from_the_training_rows_alone(tmp_path):
    data = load_npz(write(tmp_path))
    train = data.second.values[data.rows("train")]
    torch.testing.assert_close(train.mean(0), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(4))
    changed = arrays()["text"]
    changed[arrays()["split"] == 2] += 100
    again = load_npz(write(tmp_path, text=changed))
    torch.testing.assert_close(again.second.values[data.rows("train")], train)


def test_three_dimensional_arrays_and_drawn_splits_work(tmp_path):
    data = load_npz(write(tmp_path, pose=np.ones((30, 7, 2)), off_pose=None, split=None), seed=1)
    assert data.first.take(torch.arange(3)).lengths.tolist() == [7, 7, 7]
    assert all(len(data.rows(split)) for split in ("train", "valid", "test"))


BROKEN = {
    "no labels": ({"y": None}, "no labels y"),
    "one modality": ({"text": None}, "two modalities"),
    "wrong rows": ({"text": np.ones((29, 4))}, "29 rows"),
    "not finite": ({"text": np.full((30, 4), np.nan)}, "not finite"),
    "offsets too short": ({"off_pose": np.arange(31)}, "off_pose"),
    "empty sequence": (
        {"pose": np.ones((29, 3)), "off_pose": np.r_[0, 0, np.arange(1, 30)]},
        "at least one frame",
    ),
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
        load("cifar")
    with pytest.raises(ValueError, match="modality 'smell' is missing"):
        load_npz(write(tmp_path), modalities=("smell", "text"))


def test_synthetic_views_share_their_latents_and_balance_the_classes():
    data = generate(2000, seed=1)
    assert data.first.values.shape == data.second.values.shape == (2000, 100)
    assert 0.4 < data.y.float().mean() < 0.6
    assert torch.linalg.matrix_rank(data.first.values - data.first.values.mean(0), atol=1e-2) <= 16
    joint = torch.cat([data.first.values, data.second.values], 1)
    assert torch.linalg.matrix_rank(joint - joint.mean(0), atol=1e-2) == 22
    assert generate(100, labels="planar_flow").num_classes == 20
    with pytest.raises(ValueError, match="label_dims"):
        generate(100, label_dims=(11, 6, 6))


def test_a_split_must_exist_and_fill_a_batch():
    data = load_digits()
    with pytest.raises(ValueError, match="split must be one of"):
        data.rows("holdout")
    with pytest.raises(ValueError, match="batch_size is 5000"):
        data.loader("train", 5000, seed=0)


def test_the_order_of_batches_depends_on_seed_and_epoch_alone():
    loader = load_digits().loader("train", 64, seed=5)

    def labels(epoch):
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch.y for batch in loader])

    first = labels(0)
    assert not torch.equal(first, labels(1))
    assert torch.equal(first, labels(0))


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
    assert batch.x1.values.shape[2] == 60 and batch.x2.values.shape[2] == 6
    assert not torch.equal(batch.x1.lengths, batch.x2.lengths)
