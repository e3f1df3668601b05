"""Data sets with any modalities (ragged, tokens, missing): standardisation in any unit, and batches that are determined
by seed and epoch."""

import dataclasses

import pytest
import torch

from models.batch import Inputs, Target
from models.data import DataConfig, Dataset, Modality, load, load_digits
from models.data.splits import group_split, random_split, ranked_split, with_fewer_rows

FRAMES = Modality("frames", torch.arange(10.0).reshape(5, 2), torch.tensor([0, 2, 2, 5]))
TOKENS = Modality("tokens", torch.tensor([3, 1, 2]), torch.tensor([0, 1, 3, 3]), table=torch.randn(4, 7))
VECTORS = Modality("vectors", torch.randn(3, 4), present=torch.tensor([True, True, False]))


def dataset(**changes):
    parts = {
        "name": "d",
        "modalities": (FRAMES, TOKENS, VECTORS),
        "labels": torch.tensor([0, 1, 0]),
        "target": Target.classes(2),
        "split": torch.tensor([0, 0, 1]),
    }
    return Dataset(**parts | changes)


def test_a_batch_has_every_modality_padded_and_says_what_is_missing():
    batch = dataset().batch(torch.tensor([2, 1]))
    frames, tokens, vectors = batch.inputs.values()
    assert list(batch.inputs) == ["frames", "tokens", "vectors"] and batch.size == 2
    assert frames.lengths.tolist() == [3, 0] and frames.present.tolist() == [True, False]
    assert torch.equal(frames.values[0], FRAMES.values[2:]) and (frames.values[1] == 0).all()
    assert tokens.values.dtype == torch.int64 and tokens.values.tolist() == [[0, 0], [1, 2]]
    assert vectors.present.tolist() == [False, True] and (vectors.values[0] == 0).all()
    assert batch.target.tolist() == [0, 1] and batch.rows.tolist() == [2, 1]


def test_a_batch_whose_sequences_are_all_missing_has_one_step_of_zeros():
    x = FRAMES.take(torch.tensor([1, 1]))
    assert x.values.shape == (2, 1, 2) and (x.values == 0).all() and x.lengths.tolist() == [0, 0]
    empty = Modality("e", torch.zeros(0, 2), torch.tensor([0, 0]))
    assert empty.take(torch.tensor([0])).values.shape == (1, 1, 2)


def test_complete_rows_have_every_modality_and_rows_are_selected_everywhere():
    batch = dataset(labelled=torch.tensor([True, False, True])).batch(torch.arange(3))
    assert batch.complete().rows.tolist() == [0] and batch.with_labels().rows.tolist() == [0, 2]
    two = dataset(modalities=(TOKENS, VECTORS)).batch(torch.arange(3)).complete()
    assert two.rows.tolist() == [0, 1] and two.target.tolist() == [0, 1]


@pytest.mark.parametrize("unit", [1e-13, 1.0, 1e9])
def test_standardised_features_do_not_depend_on_their_unit(unit):
    values = torch.randn(200, 3)
    data = dataset(
        modalities=(Modality("x", values * unit),),
        labels=torch.arange(200) % 2,
        split=torch.arange(200) % 3,
    ).standardised()
    train = data["x"].values[data.rows("train")]
    torch.testing.assert_close(train.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(3))


def test_constant_features_are_centred_alone_however_large():
    values = torch.full((4, 2), 3.7e6)
    values[3, 1] += 1  # row 3 is not a training row
    data = dataset(modalities=(Modality("x", values),), labels=torch.arange(4) % 2, split=torch.tensor([0, 0, 0, 2]))
    assert (data.standardised()["x"].values[:, 0] == 0).all() and data.standardised()["x"].values[3, 1] == 1


def test_statistics_leave_out_other_rows_missing_rows_pictures_and_tokens():
    data = dataset().standardised()
    train = FRAMES.values[:2]
    torch.testing.assert_close(data["frames"].values[:2], (train - train.mean(0)) / train.std(0, correction=0))
    assert (data["vectors"].values[2] == 0).all() and torch.equal(data["tokens"].values, TOKENS.values)
    assert torch.equal(load_digits().standardised()["left"].values, load_digits()["left"].values)
    gone = dataset(modalities=(Modality("v", torch.randn(3, 2), present=torch.tensor([False, False, True])),))
    with pytest.raises(ValueError, match="'v' is missing in every train row"):
        gone.standardised()


def test_a_digest_changes_with_values_labels_and_splits_alone():
    data = dataset()
    assert data.digest() == dataset().digest() and data.digest() == dataset(name="other").digest()
    moved = dataclasses.replace(FRAMES, values=FRAMES.values + 1e-6)
    changed = [
        dataset(modalities=(moved, TOKENS, VECTORS)),
        dataset(labels=torch.tensor([1, 1, 0])),
        dataset(split=torch.tensor([0, 0, 2])),
        dataset(labelled=torch.tensor([True, True, False])),
    ]
    assert len({d.digest() for d in [data, *changed]}) == 5


WRONG = {
    "rows": ({"split": torch.zeros(4, dtype=torch.int64)}, "modality 'frames' has 3 rows, split has 4"),
    "codes": ({"split": torch.tensor([0, 3, 1])}, "split must hold the codes .*; got 3"),
    "names": ({"modalities": (FRAMES, FRAMES)}, "different names"),
    "none": ({"modalities": ()}, "has no modality"),
    "classes": ({"labels": torch.tensor([0, 1, 2])}, "labels must be classes 0 to 1, got 0 to 2"),
    "float classes": ({"labels": torch.zeros(3)}, "int64"),
    "no labels": ({"labels": None}, "labels must be given"),
    "shape": ({"labels": torch.zeros(3, 2), "target": Target.regression()}, "labels must be float"),
    "infinite": ({"labels": torch.full((3,), torch.inf), "target": Target.regression()}, "finite"),
    "labelled": ({"labelled": torch.ones(2, dtype=torch.bool)}, "labelled must be bool"),
    "ids": ({"ids": ("a",)}, "ids must be 3"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "-"))
def test_a_data_set_that_does_not_fit_together_is_explained(case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        dataset(**changes)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"values": torch.zeros(3)}, r"must be \[N, D\]"),
        ({"values": torch.zeros(3, 2), "offsets": torch.tensor([0, 2, 1, 3])}, "must not decrease"),
        ({"values": torch.zeros(3, 2), "offsets": torch.tensor([0, 2])}, "from 0 to 3"),
        ({"values": torch.arange(3)}, "tokens"),
        ({"values": torch.tensor([0, 9]), "offsets": torch.tensor([0, 2]), "table": torch.zeros(5, 2)}, "0 and 4"),
        ({"values": torch.zeros(3, 2), "shape": (2, 2)}, "pixels"),
        ({"values": torch.zeros(3, 2), "present": torch.ones(2, dtype=torch.bool)}, "present of 'm'"),
    ],
)
def test_a_modality_that_does_not_fit_together_is_explained(parts, message):
    with pytest.raises(ValueError, match=message):
        Modality("m", **parts)


def test_modalities_are_chosen_by_name_and_in_order():
    assert dataset().choose(("vectors", "frames")).names == ("vectors", "frames")
    with pytest.raises(ValueError, match="different names out of frames, tokens, vectors"):
        dataset().choose(("smell",))
    picked = FRAMES.select(torch.tensor([2, 0]))
    assert picked.offsets.tolist() == [0, 3, 5] and torch.equal(picked.values[3:], FRAMES.values[:2])


def test_a_split_must_exist_and_fill_a_batch():
    data = load_digits()
    with pytest.raises(ValueError, match="split must be one of"):
        data.rows("holdout")
    with pytest.raises(ValueError, match="batch_size is 5000"):
        data.loader("train", 5000, seed=0)
    with pytest.raises(ValueError, match="has no test rows"):
        dataset().rows("test")
    with pytest.raises(ValueError, match="no labelled valid rows"):
        dataset(labelled=torch.tensor([True, True, False])).labelled_rows("valid")


def test_the_order_of_batches_depends_on_seed_and_epoch_alone():
    loader = load_digits().loader("train", 64, seed=5)

    def order(epoch):
        loader.sampler.set_epoch(epoch)
        return torch.cat([batch.rows for batch in loader])

    first = order(0)
    assert not torch.equal(first, order(1))
    assert torch.equal(first, order(0))


def test_drawn_splits_keep_groups_together_and_regression_targets_balanced():
    groups = torch.arange(300).numpy() // 10
    split = group_split(groups, 0)
    assert all(len(set(split[groups == g])) == 1 for g in range(30)) and set(split) == {0, 1, 2}
    y = torch.randn(1000).numpy()
    ranked = ranked_split(y, 0)
    assert abs(y[ranked == 0].mean() - y[ranked == 2].mean()) < 0.1
    assert [int((random_split(10, 3) == code).sum()) for code in range(3)] == [6, 2, 2]


def test_inputs_move_between_dtypes_without_their_lengths():
    x = Inputs(torch.zeros(2, 3, 1), torch.tensor([3, 1])).to(torch.float64)
    assert x.values.dtype == torch.float64 and x.lengths.dtype == torch.int64


def test_a_limit_keeps_few_rows_of_every_split_and_of_every_class():
    data = dataclasses.replace(load_digits(seed=0), ids=tuple(map(str, range(1797))))
    few, more = (with_fewer_rows(data, limit, seed=1) for limit in (10, 25))
    for split in ("train", "valid", "test"):
        rows = few.rows(split)
        assert len(rows) == 10 and few.labels[rows].bincount().tolist() == [1] * 10
    assert set(few.ids) < set(more.ids) < set(data.ids) and few.ids != with_fewer_rows(data, 10, seed=2).ids
    where = torch.tensor([int(name) for name in few.ids])
    assert torch.equal(few["left"].values, data["left"].values[where]) and torch.equal(few.split, data.split[where])
    assert torch.equal(with_fewer_rows(data, 10**6, seed=1).split, data.split)
    assert load(DataConfig(limit=7)).rows("test").shape == (7,)
    with pytest.raises(ValueError, match="limit must be at least 1 row, or 0 for all of them; got -1"):
        DataConfig(limit=-1)
