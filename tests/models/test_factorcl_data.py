"""Data whose shared and unique information is known: pictures of two digits, and latents that determine the label."""

import numpy as np
import pytest
import torch

from models.data import DataConfig, generate, load
from models.data.sources import files, synthetic, two_digit, two_digit_small


def coded(rows=40):
    """Images whose pixels are digit / 10, except a corner pixel that identifies the image."""
    digits = np.arange(10 * rows) % 10
    images = np.repeat(digits / 10, 6).reshape(-1, 3, 2).astype(np.float32)
    images[:, 0, 0] = np.arange(len(images)) / len(images)
    return images, digits


def test_pictures_hold_the_digits_that_make_the_label(monkeypatch):
    monkeypatch.setattr(two_digit, "ROWS", (60, 20, 20))
    images, digits = coded()
    data = two_digit.dataset(images, digits, "d", 0)
    left, right = (m.values.reshape(-1, 3, 4) for m in data.modalities)
    s, a, b = ((10 * part).round().long() for part in (left[:, 1, 0], left[:, 1, 2], right[:, 1, 2]))
    assert torch.equal((10 * right[:, 1, 0]).round().long(), s)
    assert torch.equal(data.labels, s % 2 + 2 * (a % 2) + 4 * (b % 2))
    shared = two_digit.dataset(images, digits, "d", 0, "shared")
    unique = two_digit.dataset(images, digits, "d", 0, "unique")
    assert torch.equal(shared.labels, s % 2) and torch.equal(unique.labels, a % 2 + 2 * (b % 2))
    assert (shared.target.size, unique.target.size, data.target.size) == (2, 4, 8)


def test_no_image_is_in_two_splits(monkeypatch):
    monkeypatch.setattr(two_digit, "ROWS", (60, 20, 20))
    data = two_digit.dataset(*coded(), "d", 3)
    marks = [m.values.reshape(-1, 3, 4)[:, 0, column] for m in data.modalities for column in (0, 2)]
    used = [set(torch.cat([mark[data.split == code] for mark in marks]).tolist()) for code in range(3)]
    assert all(used) and not (used[0] & used[1] | used[0] & used[2] | used[1] & used[2])


def test_two_digit_falls_back_to_small_images_without_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MI_KERNELS_DATA", str(tmp_path))
    monkeypatch.setattr(two_digit, "ROWS", (60, 20, 20))
    monkeypatch.setattr(two_digit_small, "ROWS", (60, 20, 20))
    fallen, small = two_digit.load(1), two_digit_small.load(1)
    assert fallen["left"].shape == (8, 16)
    assert torch.equal(fallen["right"].values, small["right"].values)
    assert not torch.equal(fallen["right"].values, two_digit_small.load(2)["right"].values)


def test_two_digit_reads_mnist_where_it_is(monkeypatch, tmp_path):
    images = (255 * coded()[0]).astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=coded()[1].astype(np.uint8))
    monkeypatch.setenv("MI_KERNELS_DATA", str(tmp_path))
    monkeypatch.setattr(two_digit, "ROWS", (60, 20, 20))
    assert files.folder() == tmp_path
    assert two_digit.load()["left"].shape == (3, 4)


@pytest.mark.parametrize("name", ["two-digit-small", "synthetic", "synthetic-gaussian"])
def test_an_unknown_target_is_named(name):
    with pytest.raises(ValueError, match="target must be one of all"):
        load(DataConfig(name, target="both"))


def test_the_label_depends_on_the_latents_of_its_target():
    views = [synthetic.load(0, target)["x1"].values for target in ("", "all", "unique")]
    assert torch.equal(views[0], views[1]) and torch.equal(views[0], views[2])
    assert torch.equal(synthetic.load(0, "unique").labels, generate(seed=0, label_dims=(0, 6, 6)).labels)


def test_gaussian_mixing_is_standard_normal():
    views = generate(3000, mixing="gaussian", latent_dims=(10, 6, 6))["x1"].values
    assert views.var().item() == pytest.approx(16 * 0.5, rel=0.15) and abs(views.mean().item()) < 0.2
    with pytest.raises(ValueError, match="mixing"):
        generate(mixing="laplace")
