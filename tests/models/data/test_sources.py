"""Data sets by name: contents, splits, rejected settings; batches of ragged sequences."""

import numpy as np
import pytest
import torch

from models.batch import Target
from models.data import SOURCES, DataConfig, Dataset, Modality, generate, load_digits, load_utd_mhad
from models.data import load as load_config
from models.data.dataset import SPLITS
from models.data.sources import MODULES, avdigits, files, load, mosi
from models.data.sources.utd_mhad import HIP_CENTRE, SHOULDER_CENTRE, default_path, normalise_skeletons
from tests.models.data import writers


def write(tmp_path, **changes):
    content = writers.npz_content() | changes
    path = tmp_path / "data.npz"
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


def sizes(data):
    return [int((data.split == code).sum()) for code in (*SPLITS.values(), -1)]


def test_digits_are_two_halves_with_a_stratified_split():
    data = load_digits(seed=3)
    assert data["left"].dim == data["right"].dim == 32 and data.target.size == 10
    for split, share in (("train", 0.6), ("valid", 0.2), ("test", 0.2)):
        counts = data.labels[data.rows(split)].bincount()
        assert ((counts / data.labels.bincount() - share).abs() < 0.02).all()
    assert not torch.equal(data.split, load_digits(seed=4).split)


def test_an_npz_file_gives_ragged_and_plain_modalities(tmp_path):
    data = load(write(tmp_path))
    assert data["pose"].is_sequence and not data["text"].is_sequence and data.target.size == 3
    source = writers.npz_content()
    x = data["pose"].take(torch.tensor([4, 7]))
    assert x.lengths.tolist() == np.diff(source["off_pose"])[[4, 7]].tolist()
    assert x.values.shape[1] == x.lengths.max()
    for row, length in zip(x.values, x.lengths, strict=True):
        assert (row[length:] == 0).all()


def test_three_dimensional_arrays_and_drawn_splits_work(tmp_path):
    data = load(write(tmp_path, pose=np.ones((30, 7, 2)), off_pose=None, split=None), seed=1)
    assert data["pose"].take(torch.arange(3)).lengths.tolist() == [7, 7, 7]
    assert all(len(data.rows(split)) for split in SPLITS)


def test_names_paths_and_modalities_that_do_not_exist_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match=r"data must be digits, synthetic, .* or a file or folder; got 'cifar'"):
        load("cifar")
    with pytest.raises(ValueError, match="modality 'smell' is missing; the file has pose, text"):
        load(write(tmp_path), modalities=("smell", "text"))
    assert load(write(tmp_path), modalities=("text", "pose")).names == ("text", "pose")
    with pytest.raises(ValueError, match="split must be left out for 'digits'"):
        load("digits", split="other")


def test_another_label_and_another_split_of_a_file_are_chosen_by_name(tmp_path):
    more = {"y_age": np.linspace(0, 1, 30), "split_second": np.arange(30) % 3}
    path = write(tmp_path, **more)
    data = load(path, target="age", split="second")
    assert data.target.is_regression and data.split.tolist() == more["split_second"].tolist()
    with pytest.raises(ValueError, match="has no label 'weight'; it has y, age"):
        load(path, target="weight")
    with pytest.raises(ValueError, match="has no split 'third'; it has second"):
        load(path, split="third")


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("avdigits",)])
def test_every_data_set_loads_with_rows_in_every_split(data_dir, name):
    data = load(name)
    assert data.name == name
    for split in SPLITS:
        batch = data.batch(data.labelled_rows(split)[:4])
        assert list(batch.inputs) == list(data.names) and len(batch.target) == 4
        assert all(bool(x.values.isfinite().all()) for x in batch.inputs.values() if x.values.is_floating_point())


def test_mosi_refuses_what_leaks(data_dir):
    assert sizes(load("mosi")) == [511, 79, 162, 1447]
    assert load("mosi").names == ("text", "audio", "video") and load("mosi").target.low == -3
    official = load("mosi", split="official")
    assert sizes(official) == [1284, 229, 686, 0] and official.names == ("tokens", "audio")
    assert official["tokens"].dim == 300
    for leaking in mosi.LEAKING:
        with pytest.raises(ValueError, match=f"modalities {leaking} of 'mosi' leak on the official split"):
            load("mosi", modalities=("audio", leaking), split="official")
    with pytest.raises(ValueError, match="split of 'mosi' must be one of heldout31, acl17, official; got 'random'"):
        load("mosi", split="random")


def test_mosi_validation_videos_of_acl17_are_no_training_videos(data_dir, caplog):
    data = load("mosi", split="acl17", target="polarity")
    assert (
        data.target.names == ("negative", "positive")
        and sizes(data)[2] == 752
        and "which text and video know" in caplog.text
    )
    videos = [set(data.groups[data.rows(split)].tolist()) for split in SPLITS]
    assert all(not a & b for i, a in enumerate(videos) for b in videos[:i])


def test_mosi_dialogue_has_every_utterance_with_those_before_it(data_dir):
    data, single = load("mosi-dialogue"), load("mosi", split="acl17", target="sentiment")
    assert len(data) == len(single) == 2199 and sizes(data)[0] + sizes(data)[1] == 1447 and sizes(data)[2] == 752
    lengths = data["text"].lengths()
    assert lengths.max() == 10 and torch.equal(lengths, data["audio"].lengths())
    # A row contains the steps of the previous row of its video, followed by its own step.
    first = int((lengths == 2).nonzero()[0])
    before, here = (data["video"].take(torch.tensor([row])).values[0] for row in (first - 1, first))
    assert torch.equal(before[0], here[0]) and here.shape[0] == 2
    assert sorted(data.labels.tolist()) == sorted(single.labels.tolist())
    with pytest.raises(ValueError, match="modalities text of 'mosi-dialogue' leak on the official split"):
        load("mosi-dialogue", modalities=("text",), split="official")
    assert load("mosi-dialogue", split="official").names == ("audio",)


def test_mmmo_has_no_text_to_train_on(data_dir):
    data = load("mmmo")
    assert sizes(data) == [220, 40, 80, 0] and data.names == ("audio", "video")
    with pytest.raises(ValueError, match="'text' of 'mmmo' has no training rows"):
        load("mmmo", modalities=("audio", "text"))


def test_mustard_folds_do_not_overlap(data_dir):
    tests = [set(load("mustard", split=f"fold{i}").rows("test").tolist()) for i in range(5)]
    assert [len(rows) for rows in tests] == [138] * 5 and len(set.union(*tests)) == 690
    data = load("mustard", seed=1)
    assert sizes(data) == [473, 79, 138, 0] and not torch.equal(data.split, load("mustard", seed=2).split)
    assert data["context"].is_tokens


def test_audio_visual_digits_pair_equal_digits(data_dir):
    data = avdigits.load(share=100)
    assert sizes(data) == [550, 50, 100, 0]
    assert data["image"].shape == (28, 28) and data["audio"].dim == 40
    labels = data.labels[data.rows("train")]
    means = torch.stack([data["image"].values[data.rows("train")][labels == digit].mean(0) for digit in range(10)])
    assert torch.pdist(means).min() > 1


def test_a_changed_file_is_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MI_KERNELS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"set MI_KERNELS_DATA to the folder that holds x\.npz"):
        files.find("x.npz")
    (tmp_path / "x.npz").write_bytes(b"1")
    assert files.find("x.npz", files.digest(tmp_path / "x.npz")).is_file() and not caplog.text
    files.find("x.npz", "0" * 64)
    assert "its SHA-256 differs" in caplog.text


def test_a_threshold_makes_two_classes_of_a_regression_target(monkeypatch):
    values = torch.linspace(-1, 1, 9)
    source = Dataset("s", (Modality("x", values[:, None]),), values, Target.regression(), torch.arange(9) % 3)
    monkeypatch.setitem(SOURCES, "line", lambda seed: source)
    found = load_config(DataConfig("line", threshold=0))
    assert found.target.size == 2 and found.labels.tolist() == (values > 0).long().tolist()
    with pytest.raises(ValueError, match="threshold needs a regression target"):
        load_config(DataConfig("digits", threshold=0))


def test_settings_reach_files_and_sources(tmp_path, data_dir):
    with pytest.raises(ValueError, match="data must be"):
        load_config(DataConfig("cifar"))
    with pytest.raises(ValueError, match=r"data\.target must be left out for 'digits'"):
        load_config(DataConfig("digits", target="mood"))
    path = writers.mmsa(tmp_path)
    config = DataConfig(str(path), modalities=("tokens", "audio"), target="classification_labels", format="mmsa")
    assert load_config(config).names == ("tokens", "audio")
    with pytest.raises(ValueError, match="leak on the official split"):
        load_config(DataConfig("mosi", modalities=("video",), split="official"))


def test_synthetic_views_share_their_latents_and_balance_the_classes():
    data = generate(2000, seed=1)
    assert data["x1"].values.shape == data["x2"].values.shape == (2000, 100)
    assert 0.4 < data.labels.float().mean() < 0.6
    assert torch.linalg.matrix_rank(data["x1"].values - data["x1"].values.mean(0), atol=1e-2) <= 16
    joint = torch.cat([data["x1"].values, data["x2"].values], 1)
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
    assert batch.inputs["skeleton"].values.shape[2] == 60 and batch.inputs["inertial"].values.shape[2] == 6
    assert not torch.equal(batch.inputs["skeleton"].lengths, batch.inputs["inertial"].lengths)
