"""Baselines with a text encoder: MAG-BERT, and BERT in MISA and MMIM. Needs the package transformers."""

import pytest
import torch

from models.registry import build
from models.settings import from_dict
from tests.models.helpers import SMALL, mixed

pytest.importorskip("transformers")
TEXT = {"hidden": 8, "layers": 1, "heads": 2, "intermediate": 8, "dropout": 0.0}
TEXTS = {"mag-bert": TEXT, "mag-xlnet": TEXT | {"layers": 2}}


def made(name, data, **model):
    config = from_dict({"model": {"name": name, **SMALL.get(name, {}), **model}})
    return build(name, config.model, data, 0)


@pytest.mark.parametrize("name", TEXTS)
def test_mag_without_a_shift_reads_normed_words_and_with_one_hears_the_others(name):
    data = mixed(missing=False)
    batch = data.batch(torch.arange(12))
    other = batch._replace(inputs=batch.inputs | {"vectors": batch.inputs["vectors"].take(torch.arange(12).roll(1))})
    for beta, hears in ((0.0, False), (1.0, True)):
        model = made(name, data, text=TEXTS[name], beta=beta, shift_dropout=0.0).eval()
        z, moved = (model.features(b.inputs) for b in (batch, other))
        assert torch.allclose(z, moved, atol=1e-6) is not hears
        if beta == 0:
            net = model.net
            plain = net.encoder(batch.inputs["tokens"], lambda words, norm=net.gate.norm: norm(words.values))
            torch.testing.assert_close(z, plain)


@pytest.mark.parametrize("name", TEXTS)
def test_mag_ignores_padding_trains_its_gate_and_is_a_base_of_the_penalty(name):
    data = mixed(missing=False)
    model = made(name, data, text=TEXTS[name]).eval()
    short = data["tokens"].lengths().argsort()[:6]
    long = torch.cat([short, data["tokens"].lengths().argsort()[-1:]])
    torch.testing.assert_close(
        model.predict(data.batch(long))[:6], model.predict(data.batch(short)), rtol=1e-4, atol=1e-5
    )
    model.train().loss(data.batch(torch.arange(16))).total.backward()
    assert all(bool(p.grad.any()) for p in model.net.gate.parameters())
    wrapped = made("mdm", data, base={"name": name, "text": TEXTS[name]}, ramp=0.0).train()
    loss = wrapped.phases()[0].loss(data.batch(torch.arange(16)))
    assert loss.total.isfinite() and "dependency" in loss.terms


@pytest.mark.parametrize("name", ["misa", "mmim"])
def test_a_text_encoder_takes_the_place_of_the_words_lstm(name):
    data = mixed("regression", missing=False)
    model = made(name, data, language="bert", text=TEXT | {"readout": "mean"}).train()
    batch = data.batch(torch.arange(16))
    model.loss(batch).total.backward()
    encoder = model.utterances.encoder
    assert all(p.grad is not None for p in encoder.parameters())
    assert len(model.utterances.lstms) == 2 and model.utterances.dims[1] == 8
    assert [u.shape[1] for u in model.utterances(batch.inputs)] == list(model.utterances.dims)
    with pytest.raises(ValueError, match="language=bert needs tokens"):
        made(name, data.choose(("frames", "vectors")), language="bert")
    assert type(model.config.text).__name__ == "TextConfig"


@pytest.mark.parametrize("name", TEXTS)
def test_mag_names_what_it_lacks(name):
    data = mixed(missing=False)
    for names, message in [(("tokens",), "two modalities or more"), (("frames", "vectors"), f"{name} needs tokens")]:
        with pytest.raises(ValueError, match=message):
            made(name, data.choose(names))
