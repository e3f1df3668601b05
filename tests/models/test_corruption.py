"""Corrupted inputs depend only on (seed, epoch, row), keep padding at 0, and follow the settings."""

import pytest
import torch

from models.batch import Batch, Inputs
from models.data.corruption import CorruptionConfig, corrupted
from tests.models.helpers import mixed


def batch(rows=400, steps=12):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, steps + 1, (rows,), generator=generator)
    valid = torch.arange(steps) < lengths[:, None]
    frames = torch.randn(rows, steps, 3, generator=generator) * valid[..., None]
    tokens = torch.randint(1, 9, (rows, steps), generator=generator) * valid
    vectors = torch.randn(rows, 20, generator=generator)
    inputs = {"frames": Inputs(frames, lengths), "tokens": Inputs(tokens, lengths), "vectors": Inputs(vectors)}
    return Batch(inputs, None, None, torch.arange(rows) * 7)


EVERYTHING = CorruptionConfig(drop={"*": 0.3}, frames={"*": 0.3}, noise={"*": 0.5}, zeros={"*": 0.1})


def test_a_row_does_not_depend_on_its_batch_or_its_padding():
    whole = corrupted(batch(), EVERYTHING, 1, 2)
    rows = torch.tensor([5, 300, 17])
    part = batch().take(rows)
    steps = int(part.inputs["frames"].lengths.max())
    cut = {n: Inputs(x.values[:, :steps], x.lengths) if x.lengths is not None else x for n, x in part.inputs.items()}
    alone = corrupted(part._replace(inputs=cut), EVERYTHING, 1, 2)
    for name, x in alone.inputs.items():
        want = whole.inputs[name].take(rows)
        torch.testing.assert_close(x.values, want.values[:, : x.values.shape[1]])
        assert torch.equal(x.mask(), want.mask())
        assert x.lengths is None or torch.equal(x.lengths, want.lengths)


@pytest.mark.parametrize("seed, epoch", [(1, 3), (2, 2)])
def test_another_seed_or_epoch_damages_otherwise(seed, epoch):
    first, other = (corrupted(batch(), EVERYTHING, *key).inputs for key in ((1, 2), (seed, epoch)))
    for name in first:
        assert not torch.equal(first[name].values, other[name].values)


def test_modalities_are_dropped_at_their_rate_and_one_always_stays():
    found = corrupted(batch(), CorruptionConfig(drop={"frames": 0.25}), 0).inputs
    gone = ~found["frames"].mask()
    assert 0.15 < gone.float().mean() < 0.35
    assert (found["frames"].values[gone] == 0).all() and (found["frames"].lengths[gone] == 0).all()
    assert found["vectors"].present is None
    everything = corrupted(batch(), CorruptionConfig(drop={"*": 1.0}), 0)
    assert (torch.stack([x.mask() for x in everything.inputs.values()]).sum(0) == 1).all()
    none = corrupted(batch(), CorruptionConfig(drop={"vectors": 1.0}), 0, keep_one=False)
    assert not none.inputs["vectors"].mask().any() and (none.inputs["vectors"].values == 0).all()


def test_lost_frames_close_up_in_order_and_one_stays():
    source = batch().inputs
    for rate, low, high in ((0.4, 0.5, 0.7), (1.0, 0.0, 0.4)):
        found = corrupted(batch(), CorruptionConfig(frames={"frames": rate}), 0).inputs["frames"]
        share = found.lengths.sum() / source["frames"].lengths.sum()
        assert low < share < high and found.lengths.min() >= 1
        for row in range(20):
            kept = [v.tolist() for v in found.values[row, : found.lengths[row]]]
            given = [v.tolist() for v in source["frames"].values[row]]
            places = [given.index(frame) for frame in kept]
            assert places == sorted(places)
            assert (found.values[row, found.lengths[row] :] == 0).all()


def test_noise_has_its_deviation_and_leaves_padding_and_tokens_alone():
    source, found = batch().inputs, corrupted(batch(), CorruptionConfig(noise={"*": 0.5}), 0).inputs
    inside = torch.arange(12) < source["frames"].lengths[:, None]
    noise = found["frames"].values - source["frames"].values
    assert noise[inside].std().item() == pytest.approx(0.5, rel=0.05) and (noise[~inside] == 0).all()
    assert abs(noise[inside].mean().item()) < 0.02
    assert (found["vectors"].values - source["vectors"].values).std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(found["tokens"].values, source["tokens"].values)


def test_zeros_have_their_rate():
    found = corrupted(batch(), CorruptionConfig(zeros={"vectors": 0.2}), 0).inputs
    assert (found["vectors"].values == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_wrong_rates_and_names_are_refused():
    with pytest.raises(ValueError, match="drop of a"):
        CorruptionConfig(drop={"a": 1.5})
    with pytest.raises(ValueError, match="noise names modality 'smell'; the data has frames, tokens, vectors"):
        CorruptionConfig(noise={"smell": 1.0}).check(mixed())
    with pytest.raises(ValueError, match="frames names modality 'vectors', which has no frames"):
        CorruptionConfig(frames={"vectors": 0.5}).check(mixed())
    with pytest.raises(ValueError, match="noise names modality 'tokens', which holds tokens"):
        CorruptionConfig(noise={"tokens": 0.5}).check(mixed())
    CorruptionConfig(frames={"*": 0.5, "tokens": 0.5}, noise={"*": 1.0}, drop={"vectors": 1.0}).check(mixed())
