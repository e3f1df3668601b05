"""The pickles of MISA and MMIM: words, frames, labels, groups; MMIM's lengths; rejected rows."""

import numpy as np
import pytest

from models.data import safe_pickle
from models.data.formats import read
from models.data.sources import load
from tests.models.data.writers import declare_lab, pickled


def test_a_folder_becomes_three_aligned_modalities(tmp_path):
    path = declare_lab(tmp_path)
    arrays = read(path)
    rows = [row for name in ("train", "dev", "test") for row in safe_pickle.load(path / f"{name}.pkl")]
    (words, visual, acoustic, spoken), label, segment = rows[8]
    text = arrays.modalities["text"].select(np.array([8]))
    assert text.values.tolist() == (np.asarray(words) + 1).tolist()
    np.testing.assert_allclose(arrays.modalities["visual"].select(np.array([8])).values, visual, rtol=1e-6)
    np.testing.assert_allclose(arrays.modalities["acoustic"].select(np.array([8])).values, acoustic, rtol=1e-6)
    assert arrays.labels["sentiment"][8] == pytest.approx(float(label[0, 0])) and arrays.ids[8] == segment
    assert arrays.texts["words"][8] == " ".join(spoken) and np.bincount(arrays.split).tolist() == [7, 3, 4]
    assert arrays.groups[0] == arrays.groups[1] != arrays.groups[2]
    data = load(path)
    assert data.names == ("text", "visual", "acoustic") and data.target.kind == "regression"


def test_stated_lengths_and_emotions_are_read(tmp_path):
    arrays = read(declare_lab(tmp_path, lengths=True, width=7))
    assert (arrays.modalities["visual"].lengths() - arrays.modalities["acoustic"].lengths() == 1).all()
    assert list(arrays.labels) == ["sentiment", "emotions"] and arrays.labels["emotions"].shape == (14, 6)


ROW = ((np.arange(2), np.ones((2, 4)), np.ones((2, 3)), ["a", "b"]), np.ones((1, 1)), "v[0]")


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "must hold a list of rows, it is a dict"),
        ([], "must hold a list of rows"),
        ([ROW[:2]], r"row 0 must be \(\(word ids, visual, acoustic, words\), label, segment\)"),
        ([((*ROW[0][:3], ["a"], 3, 2), *ROW[1:])], "length of visual in row 10 must lie in 0 to 2"),
        ([((np.array([-1]), *ROW[0][1:]), *ROW[1:])], "word ids of row 10 must be whole numbers"),
        ([((ROW[0][0], np.ones(2), *ROW[0][2:]), *ROW[1:])], r"visual of row 10 must be \[steps, features\]"),
        ([(ROW[0], np.ones((1, 2)), "v[0]")], r"labels must have 1 or 7 columns in every row, got \[1, 2\]"),
    ],
)
def test_malformed_rows_are_named(content, message, tmp_path):
    path = declare_lab(tmp_path)
    pickled(content, path / "test.pkl")
    with pytest.raises(ValueError, match=message):
        read(path)
