"""Data settings: training with a share of the labels, and texts tokenized by another tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from models.batch import Target
from models.data import SPLITS, DataConfig, Dataset, Modality, load
from models.data.labels import with_share_of_labels
from models.data.tokenizer import load_tokenizer, place, tokenised

ROWS = 60


def data(target="classes", labelled=None):
    torch.manual_seed(0)
    labels = torch.arange(ROWS) % 3 if target == "classes" else torch.randn(ROWS)
    what = Target.classes(3) if target == "classes" else Target.regression()
    split = torch.arange(ROWS) // 3 % 5 // 3
    return Dataset("made", (Modality("x", torch.randn(ROWS, 2)),), labels, what, split, labelled)


def labelled_train(found):
    return set(found.labelled_rows("train").tolist())


def test_share_is_kept_in_every_class():
    found = with_share_of_labels(data(), 0.5, 0)
    rows = torch.tensor(sorted(labelled_train(found)))
    assert found.labels[rows].bincount().tolist() == [6, 6, 6]
    assert len(found.rows("train")) == 36
    assert len(found.labelled_rows("valid")) == 24


@pytest.mark.parametrize("target", ["classes", "regression"])
def test_larger_shares_contain_smaller_ones(target):
    sets = [labelled_train(with_share_of_labels(data(target), share, 3)) for share in (0.01, 0.2, 0.5, 1.0)]
    assert all(small < large for small, large in pairwise(sets))
    assert sets[-1] == set(data().rows("train").tolist())


def test_share_depends_on_the_seed():
    first, again, other = (labelled_train(with_share_of_labels(data(), 0.3, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_rows_without_a_label_can_leave_training():
    had = torch.arange(ROWS) % 4 != 0
    found = with_share_of_labels(data(labelled=had), 0.5, 0, keep=False)
    assert set(found.rows("train").tolist()) == labelled_train(found)
    assert all(had[row] for row in found.rows("train"))
    assert len(found.rows("valid")) == 24


def test_settings_keep_a_share():
    found = load(DataConfig("digits", labels=0.1), seed=2)
    kept, train = len(labelled_train(found)), int((found.split == SPLITS["train"]).sum())
    assert 0.08 < kept / train < 0.12
    assert len(load(DataConfig("digits", labels=0.1, unlabelled=False), seed=2).rows("train")) == kept


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_shares_outside_are_refused(share):
    with pytest.raises(ValueError, match="labels must be above 0"):
        DataConfig(labels=share)
    with pytest.raises(ValueError, match="share must be above 0"):
        with_share_of_labels(data(), share, 0)


def texts(*rows):
    tokens = [[1] * len(row.split()) for row in rows]
    offsets = torch.tensor([0, *map(len, tokens)]).cumsum(0)
    return Modality("said", torch.ones(int(offsets[-1]), dtype=torch.int64), offsets, vocabulary=2, texts=rows)


def said(*rows):
    return Dataset("said", (texts(*rows),), None, Target.none(), torch.zeros(len(rows), dtype=torch.int64))


@pytest.fixture
def tokenizer(tmp_path):
    """Writes a WordPiece tokenizer of ten tokens; returns its folder."""
    pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film", "##s", "a", "not"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return str(tmp_path)


def test_texts_become_tokens_of_the_named_tokenizer(tokenizer):
    found = tokenised(said("Good films", "", "not a film"), tokenizer)["said"]
    rows = [found.values[start:stop].tolist() for start, stop in pairwise(found.offsets)]
    assert rows == [[2, 5, 6, 7, 3], [], [2, 9, 8, 6, 3]]
    assert found.vocabulary == 10 and found.tokenizer == tokenizer
    assert found.has().tolist() == [True, False, True]


def test_texts_are_cut_before_the_last_special_token(tokenizer):
    found = tokenised(said("a good good film"), tokenizer, most=4)["said"]
    assert found.values.tolist() == [2, 8, 5, 3]


def test_texts_follow_their_rows():
    assert texts("one", "two words", "three").select(torch.tensor([2, 0])).texts == ("three", "one")


def test_texts_must_fit_the_rows():
    with pytest.raises(ValueError, match="texts of 'said' must be 1, one per row, got 2"):
        replace(texts("one"), texts=("one", "two"))


def test_data_without_texts_is_refused():
    with pytest.raises(ValueError, match="data 'made' has none in x"):
        tokenised(data(), "anything")


def test_missing_checkpoints_are_named():
    with pytest.raises(FileNotFoundError, match="no installed package 'no_such_package'"):
        place("package:no_such_package/model")
    with pytest.raises(FileNotFoundError, match="no such folder: /nowhere"):
        place("/nowhere")
    assert place("some/name") == "some/name"


def test_unreadable_tokenizer_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


def test_a_threshold_that_leaves_one_class_is_refused_with_the_range_of_the_labels():
    from models.data import _thresholded

    data = Dataset(
        "made", (Modality("x", torch.randn(4, 2)),), torch.tensor([1.0, 2.0, 3.0, 9.0]), Target.regression(),
        torch.tensor([0, 0, 0, 2])
    )  # fmt: skip
    assert _thresholded(data, 2.0).target.is_classes
    with pytest.raises(ValueError, match="lie between 1 and 3; got 5"):
        _thresholded(data, 5.0)
