"""Encoders ignore padding; augmentations keep shapes, padding and what their documentation says."""

import dataclasses

import pytest
import torch

from models.data import Inputs, Modality
from models.data.augmentations import Augmentation, cutmix, noisy, time_warp
from models.layers.encoders import EncoderConfig, GRUEncoder, SegmentEncoder, make_encoder, mlp, segment_statistics

SEQUENCES = Modality("s", torch.zeros(10, 3), torch.tensor([0, 4, 10]))
VECTORS = Modality("v", torch.zeros(5, 20))
TOKENS = Modality("t", torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3]), table=torch.randn(5, 6))
IMAGES = Modality("i", torch.zeros(5, 32), shape=(8, 4))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sequences(rows=64, steps=12):
    lengths = torch.randint(5, steps + 1, (rows,), generator=generator())
    valid = torch.arange(steps) < lengths[:, None]
    return Inputs(torch.randn(rows, steps, 3, generator=generator()) * valid[..., None], lengths)


@pytest.mark.parametrize("kind", [GRUEncoder, SegmentEncoder])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_a_sequence_encoder_never_sees_the_padding(kind, stride):
    torch.manual_seed(0)
    encoder = kind(3, 8, 4, stride)
    x = sequences()
    together = encoder(x)
    for row in range(4):
        length = int(x.lengths[row])
        alone = encoder(Inputs(x.values[row : row + 1, :length], x.lengths[row : row + 1]))
        torch.testing.assert_close(together[row], alone[0])


@pytest.mark.parametrize("kind", [GRUEncoder, SegmentEncoder])
def test_a_missing_sequence_is_encoded_whatever_stands_in_its_row(kind):
    encoder, x = kind(3, 8, 4), sequences(rows=4)
    lengths = torch.cat([torch.tensor([0]), x.lengths[1:]])
    found = encoder(Inputs(x.values, lengths))
    other = encoder(Inputs(torch.cat([torch.full_like(x.values[:1], torch.nan), x.values[1:]]), lengths))
    assert found.isfinite().all()
    torch.testing.assert_close(found, other)


def test_segments_have_the_mean_and_deviation_of_their_own_frames():
    x = sequences(rows=5)
    found = segment_statistics(x.values.double(), x.lengths, 3).reshape(5, 3, 2, 3)  # [B, segment, mean|std, D]
    for row, values, length in zip(found, x.values.double(), x.lengths, strict=True):
        for part in range(3):
            frames = values[[t for t in range(length) if t * 3 // length == part]]
            torch.testing.assert_close(row[part, 0], frames.mean(0))
            torch.testing.assert_close(row[part, 1], (frames.var(0, correction=0) + 1e-5).sqrt())


def test_more_segments_than_frames_stay_finite():
    x = Inputs(torch.randn(2, 3, 3), torch.tensor([3, 1]))
    assert SegmentEncoder(3, 8, 4, segments=7)(x).isfinite().all()


def test_segments_tell_a_movement_from_its_reverse():
    x = torch.randn(1, 12, 3)
    encoder = SegmentEncoder(3, 8, 4, segments=4)
    assert (encoder(x) - encoder(x.flip(1))).abs().max() > 0.01


def test_encoders_follow_the_kind_of_modality():
    config = EncoderConfig(hidden=8, out_dim=4, layers=1)
    assert isinstance(make_encoder(SEQUENCES, dataclasses.replace(config, kind="gru")), GRUEncoder)
    assert isinstance(make_encoder(SEQUENCES, config), SegmentEncoder)
    assert make_encoder(SEQUENCES, config)(sequences()).shape == (64, 4)
    assert make_encoder(VECTORS, config)(torch.zeros(5, 20)).shape == (5, 4)
    tokens = Inputs(torch.tensor([[1, 2, 3], [2, 0, 0]]), torch.tensor([3, 1]))
    assert make_encoder(TOKENS, config)(tokens).shape == (2, 4)
    trained = make_encoder(dataclasses.replace(TOKENS, table=None), config)
    assert trained(tokens).shape == (2, 4) and "embedding.weights.weight" in trained.state_dict()
    with pytest.raises(ValueError, match="activation"):
        mlp(2, 2, 2, 1, "swish")


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("modality", [SEQUENCES, VECTORS, IMAGES], ids=["sequences", "vectors", "images"])
def test_views_have_the_shape_of_their_input_and_repeat_by_seed(modality, unique):
    x = sequences() if modality.is_sequence else Inputs(torch.randn(64, modality.dim, generator=generator()))
    before = x.values.clone()
    augment = Augmentation(modality, unique)
    view = augment(x, generator(1))
    assert view.values.shape == x.values.shape and view.values.isfinite().all()
    assert torch.equal(x.values, before)
    assert torch.equal(view.values, augment(x, generator(1)).values)
    assert not torch.equal(view.values, augment(x, generator(2)).values)


def test_dropout_acts_in_training_alone():
    for modality, x, kind in (
        (SEQUENCES, sequences(), "segments"),
        (SEQUENCES, sequences(), "gru"),
        (VECTORS, torch.randn(5, 20), "segments"),
    ):
        encoder = make_encoder(modality, EncoderConfig(hidden=8, out_dim=4, layers=1, kind=kind, dropout=0.5))
        assert not torch.equal(encoder(x), encoder(x))
        assert torch.equal(encoder.eval()(x), encoder(x))


def test_noise_has_its_scale_and_leaves_the_padding_zero():
    x = sequences()
    noise = noisy(x, 0.2, generator()).values - x.values
    padding = torch.arange(12) >= x.lengths[:, None]
    assert (noise[padding] == 0).all()
    assert noise[~padding].std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("unique", [False, True])
def test_views_of_sequences_leave_the_padding_zero(unique):
    x = sequences()
    view = Augmentation(SEQUENCES, unique)(x, generator())
    padding = torch.arange(12) >= x.lengths[:, None]
    assert (view.values[padding] == 0).all()


def test_independent_views_of_vectors_use_all_four_transforms():
    x = Inputs(torch.randn(400, 20, generator=generator()) + 5)
    view = Augmentation(VECTORS)(x, generator()).values
    same = (view == x.values).all(1)
    swapped = (view == x.values.roll(10, 1)).all(1)
    dropped = (view == 0).sum(1) == 2
    noisy = ~same & ~swapped & ~dropped
    assert all(60 < kind.sum() < 140 for kind in (same, swapped, dropped, noisy))


def test_a_unique_view_of_a_sequence_changes_still_frames_only():
    x = sequences()
    view = Augmentation(SEQUENCES, unique=True)(x, generator())
    changed = (view.values != x.values).any(2)
    assert torch.equal(changed.sum(1), x.lengths // 2)


def test_a_unique_view_of_an_image_does_not_move_it():
    images = torch.zeros(50, 8, 4)
    images[:, 3, 2] = 1
    view = Augmentation(IMAGES, unique=True)(Inputs(images.reshape(50, 32)), generator()).values
    assert (view.argmax(1) == 3 * 4 + 2).all()
    moved = Augmentation(IMAGES)(Inputs(images.reshape(50, 32)), generator()).values
    assert (moved.argmax(1) != 3 * 4 + 2).any()


def test_cutmix_takes_a_run_of_features_from_one_other_row():
    x = torch.arange(8.0)[:, None] * 100 + torch.arange(20.0)
    found = cutmix(x, generator())
    for row in range(8):
        sources = found[row].div(100).floor().long()
        assert torch.equal(found[row] % 100, torch.arange(20.0))
        changed = torch.nonzero(sources != row).flatten()
        assert len(sources[changed].unique()) <= 1
        assert len(changed) == 0 or int(changed[-1] - changed[0]) == len(changed) - 1
    shares = (cutmix(torch.arange(2000.0)[:, None].expand(-1, 20), generator()) != torch.arange(2000.0)[:, None])
    assert 0.45 < shares.float().mean() < 0.55


def test_a_time_warp_keeps_ends_order_and_padding_and_moves_the_middle():
    steps = 12
    lengths = torch.tensor([12, 5, 1, 9])
    ramp = torch.arange(1.0, steps + 1)[None, :, None].expand(4, -1, 2)
    x = ramp.masked_fill((torch.arange(steps) >= lengths[:, None])[..., None], 0)
    found = time_warp(x, lengths, generator())
    for row, length in enumerate(lengths.tolist()):
        values = found[row, :length, 0]
        torch.testing.assert_close(values[[0, -1]], torch.tensor([1.0, float(length)]))
        assert (values.diff() >= -1e-5).all() and (found[row, length:] == 0).all()
    assert (found[0, :, 0] - x[0, :, 0]).abs().max() > 0.2
    torch.testing.assert_close(found, time_warp(x, lengths, generator()))


@pytest.mark.parametrize("modality", [SEQUENCES, VECTORS, TOKENS, IMAGES], ids=lambda m: m.name)
def test_mixing_views_keep_shapes_and_lengths(modality):
    rows = torch.arange(len(modality))
    given = modality.take(rows)
    found = Augmentation(modality, mixing=True)(given, generator())
    assert found.values.shape == given.values.shape and found.values.dtype == given.values.dtype
    assert found.lengths is given.lengths


def test_pictures_are_encoded_by_convolutions_where_asked():
    encoder = make_encoder(IMAGES, EncoderConfig(out_dim=6, pictures="convolution"))
    found = encoder(IMAGES.take(torch.arange(5)))
    assert found.shape == (5, 6) and any(isinstance(m, torch.nn.Conv2d) for m in encoder.modules())
    vectors = make_encoder(VECTORS, EncoderConfig(pictures="convolution"))
    assert not any(isinstance(m, torch.nn.Conv2d) for m in vectors.modules())
    with pytest.raises(ValueError, match="pictures of 8 x 4, got 31 pixels"):
        encoder(torch.zeros(2, 31))
