"""MIRD: parameter counts of the public code, losses against plain formulas, alternating steps, padding, settings."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.batch import Batch, Inputs, Target
from models.data import Dataset, Modality
from models.layers.mult import MulTConfig
from models.layers.text import TextConfig
from models.mird import LADDER, MIRD, QUIRKS, Settings
from models.mird.model import log_above
from models.training.config import TrainingConfig
from models.training.phases import Training

TEXT = TextConfig(hidden=8, layers=1, heads=2, intermediate=8, dropout=0.0)
SIZES = MulTConfig(dim=4, heads=2, layers=1, memory_layers=1).without_dropout()
BASE = Settings(agnostic="transformer", text=TEXT, language="lstm", sizes=SIZES, dim=6, embedding=5, dropout=0.0)


def needs_text():
    pytest.importorskip("transformers")


def made(rows=24, text=True, labelled=None, target="regression"):
    """Words and frames of different lengths, and vectors; no row misses a modality."""
    generator = torch.Generator().manual_seed(0)

    def ragged(low, high):
        return torch.cat([torch.zeros(1, dtype=torch.int64), torch.randint(low, high, (rows,), generator=generator)])

    words, frames = ragged(1, 6).cumsum(0), ragged(2, 7).cumsum(0)
    values = torch.randn(int(frames[-1]), 3, generator=generator)
    modalities = [
        Modality("words", torch.randint(1, 9, (int(words[-1]),), generator=generator), words, vocabulary=9),
        Modality("frames", values, frames),
        Modality("vector", torch.randn(rows, 4, generator=generator)),
    ]
    y = torch.randn(rows, generator=generator)
    labels, what = (y, Target.regression(1, -3, 3)) if target == "regression" else ((y > 0).long(), Target.classes(2))
    split = torch.arange(rows) % 4 // 3
    return Dataset("made", tuple(modalities if text else modalities[1:]), labels, what, split, labelled)


def model(data=None, **changes):
    torch.manual_seed(0)
    return MIRD(replace(BASE, **changes), data if data is not None else made()).double()


def batch(data=None):
    data = made() if data is None else data
    return data.batch(data.rows("train")).to(torch.float64)


def gradients(loss, net):
    net.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_the_public_codes():
    """Two bert-base, WSA, two LSTMs, three decoders and the head have 226,636,193 parameters, the estimators 25,536."""
    needs_text()
    ends = torch.tensor([0, 3])
    modalities = (
        Modality("text", torch.tensor([1, 2, 3]), ends, vocabulary=30_522),
        Modality("audio", torch.zeros(3, 33), ends),
        Modality("visual", torch.zeros(3, 709), ends),
    )
    data = Dataset("x", modalities, torch.tensor([1.0]), Target.regression(), torch.tensor([0]))
    with torch.device("meta"):
        text = TextConfig(hidden=768, layers=12, heads=12, intermediate=3072)
        net = MIRD(Settings(text=text, key_bias=True), data)
    assert numbers(net) - numbers(net.club) == 226_636_193
    assert numbers(net.club) == 6 * 4_256
    assert numbers(net.agnostic.shift) == 2_895_360
    assert [numbers(decoder) for decoder in net.decoders] == [4_069_434, 136_353, 223_557]
    assert [numbers(encoder) for encoder in net.specific][1:] == [29_504, 202_560]
    assert numbers(net.head) == 16_513
    assert net.pair_names == [
        "text-audio", "text-visual", "audio-visual", "agnostic-text", "agnostic-audio", "agnostic-visual",
    ]  # fmt: skip


def test_losses_are_their_formulas():
    net, x = model(as_published=("unbounded_mi",)), batch()
    codes = net.codes(x)
    found = net.loss(x)
    terms = found.terms
    head = net.head(torch.cat(codes, 1))
    wanted = (x.target[:, None] - net.scale.centre) / net.scale.scale
    torch.testing.assert_close(terms["prediction"], (head - wanted).square().mean())
    errors, words = [], []
    for row in range(x.size):
        for m, name in enumerate(("words", "frames", "vector")):
            decoder = net.decoders[m]
            code = torch.cat([codes[0][row], codes[m + 1][row]])
            values = x.inputs[name].values[row]
            values = values if values.dim() and name != "vector" else values[None]
            steps = int(x.inputs[name].lengths[row]) if name != "vector" else 1
            h, c, given = torch.zeros_like(code), torch.zeros_like(code), code
            for step in range(steps):
                gates = decoder.weight_ih @ given + decoder.bias_ih + decoder.weight_hh @ h + decoder.bias_hh
                i, f, g, o = gates.chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = given = o.sigmoid() * c.tanh()
                out = decoder.out.weight @ h + decoder.out.bias
                if name == "words":
                    words.append(-out.log_softmax(0)[values[step]])
                elif name == "frames":
                    errors.append((out - values[step]).square())
    torch.testing.assert_close(terms["reconstruction_words"], torch.stack(words).mean())
    torch.testing.assert_close(terms["reconstruction_frames"], torch.stack(errors).mean())
    total = sum(value.log() for name, value in terms.items() if not name.startswith("mi_"))
    between = [("words", "frames"), ("words", "vector"), ("frames", "vector")]
    between += [("agnostic", name) for name in ("words", "frames", "vector")]
    z = dict(zip(("agnostic", "words", "frames", "vector"), codes, strict=True))
    for group, (a, b) in enumerate(between):
        one = [{k: v[group] for k, v in net.club.state_dict().items()}]
        mu, raw = (_two_layers(one[0], part, z[a]) for part in ("p_mu", "p_logvar"))
        variance = (6 * (raw / 6).tanh()).exp()
        log_q = -0.5 * ((z[b][None] - mu[:, None]).square() / variance[:, None]).sum(2)  # [i, j]: log q(y_j | x_i)
        club = log_q.diagonal().mean() - log_q.mean()
        torch.testing.assert_close(terms[f"mi_{a}_{b}"], club)
        total = total + club
    torch.testing.assert_close(found.total, total)


def _two_layers(weights, part, x):
    hidden = (x @ weights[f"{part}.0.weight"].mT + weights[f"{part}.0.bias"]).relu()
    return hidden @ weights[f"{part}.2.weight"].mT + weights[f"{part}.2.bias"]


def test_gradient_of_the_log_sum_is_every_gradient_over_its_loss():
    net, x = model(mi_weight=0.0, as_published=("unbounded_mi",)), batch()
    sequences = net.sequences(x)
    codes = net.encoded(x, sequences)
    parts = [net._prediction(x, codes), *net.reconstructions(x, sequences, codes).values()]
    shares = [{k: g / part.item() for k, g in gradients(part, net).items()} for part in parts]
    found = gradients(net.loss(x).total, net)
    for name, gradient in found.items():
        if not name.startswith("club"):
            torch.testing.assert_close(gradient, sum(share[name] for share in shares if name in share), msg=name)


def test_weighted_loss_is_the_weighted_sum():
    weights = {"words": 0.1, "vector": 10.0}
    found = model(loss="weighted", reconstruction=weights, mi_weight=0.0).loss(batch())
    want = found.terms["prediction"] + found.terms["reconstruction_frames"]
    want = want + sum(weight * found.terms[f"reconstruction_{name}"] for name, weight in weights.items())
    torch.testing.assert_close(found.total, want)


def test_weights_of_single_pairs():
    plain = model(as_published=("unbounded_mi",)).loss(batch())
    weighted = model(as_published=("unbounded_mi",), mi_weights={"agnostic-frames": 3.0}).loss(batch())
    torch.testing.assert_close(weighted.total - plain.total, 2 * plain.terms["mi_agnostic_frames"])
    with pytest.raises(ValueError, match=r"mi_weights must be of words-frames.*got 'nothing'"):
        model(mi_weights={"nothing": 1.0})


def test_logarithm_goes_on_as_its_tangent():
    x = torch.tensor([2.0, 0.01, 0.001, 0.0], dtype=torch.float64, requires_grad=True)
    found = log_above(x, 0.01)
    torch.testing.assert_close(found[:2], x[:2].log())
    assert found[3].item() == pytest.approx(math.log(0.01) - 1)
    slope = torch.autograd.grad(found.sum(), x)[0]
    torch.testing.assert_close(slope, torch.tensor([0.5, 100.0, 100.0, 100.0], dtype=torch.float64))
    assert log_above(x, 0.0)[3] == -math.inf


def test_information_is_not_followed_below_zero():
    """Estimators that predict the negated codes make CLUB negative. It is then 0 without gradient, unless unbounded_mi
    is set as in the public code."""
    for published in ((), ("unbounded_mi",)):
        net, x = model(as_published=published), batch()
        with torch.no_grad():
            net.club.p_logvar[2].weight.zero_()
            for layer, sign in ((0, 1.0), (2, -1.0)):
                net.club.p_mu[layer].weight.copy_(sign * torch.eye(*net.club.p_mu[layer].weight.shape[1:]))
        codes = [F.softplus(net.codes(x)[0])] * 4
        found = net.information(codes)
        assert (found < 0).all() if published else (found == 0).all()
        slopes = torch.autograd.grad(found.sum(), codes[0])[0]
        assert bool(slopes.any()) == bool(published)


def test_independent_codes_have_little_information():
    net = model()
    codes = [torch.randn(4000, 6, dtype=torch.float64) for _ in range(4)]
    assert net.information(codes).abs().max() < 6 / math.sqrt(4000)


def trained(net, data, steps=3, **changes):
    training = Training(net, data, TrainingConfig(batch_size=len(data.rows("train")), **changes))
    optimizers = training.configure_optimizers()
    training.manual_backward = lambda loss: loss.backward()
    for _ in range(steps):
        x = data.batch(data.rows("train")).to(torch.float64)
        for phase, optimizer in zip(training.phases, optimizers, strict=True):
            training.run_phase(phase, optimizer, x, training.generator(0))
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_estimator_steps_on_shared_codes_are_the_public_ones():
    """Without dropout, estimator steps on codes that are computed once, without gradient, give the same weights as
    steps that encode again."""
    data, weights = made(), {}
    for name in ("shared", "public"):
        net = model(data)
        optimizers = [torch.optim.AdamW(p.parameters, lr=0.01, weight_decay=0.0) for p in net.phases()]
        for _ in range(3):
            x = batch(data)
            if name == "shared":
                continue
            optimizers[0].zero_grad()
            net.loss(x).total.backward()
            optimizers[0].step()
            for _ in range(5):
                net.zero_grad()
                pairs = net.sides(net.codes(x))  # with autograd, through the encoders
                net.learning_loss(pairs).total.backward()
                optimizers[1].step()
        if name == "shared":
            weights[name] = trained(model(data, club_lr=0.01), data, lr=0.01)
        else:
            weights[name] = net.state_dict()
    for name, value in weights["public"].items():
        torch.testing.assert_close(weights["shared"][name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_estimators_learn_in_their_own_phase_only():
    data = made()
    net = model(data)
    main, club = net.phases()
    mine = {id(p) for p in net.club.parameters()}
    assert {id(p) for p in club.parameters} == mine
    assert not mine & {id(p) for p in main.parameters}
    assert len(main.parameters) + len(club.parameters) == len(list(net.parameters()))
    assert club.steps == 5


def test_unlabelled_rows_enter_everything_but_the_prediction():
    some = torch.arange(24) % 3 == 0
    data = made(labelled=some)
    net, x = model(data), batch(data)
    found, labelled = net.loss(x).terms, net.loss(x.with_labels()).terms
    torch.testing.assert_close(found["prediction"], labelled["prediction"])
    for name in ("reconstruction_frames", "reconstruction_words"):
        assert abs(found[name] - labelled[name]) > 1e-4
    none = net.loss(x._replace(labelled=torch.zeros(x.size, dtype=torch.bool)))
    assert "prediction" not in none.terms and none.total.isfinite()


@pytest.mark.parametrize("rung", LADDER)
def test_ladder(rung):
    some = torch.arange(24) % 3 == 0
    data = made(labelled=some)
    net = model(data, ladder=rung)
    x = batch(data)
    kinds = {name.partition("_")[0] for name in net.loss(x).terms}
    assert kinds == {
        "prediction",
        *(["reconstruction"] if rung != "agnostic" else []),
        *(["mi"] if net.config.has("mi") else []),
    }
    assert [phase.name for phase in net.phases()] == ["main", *(["club"] if net.config.has("mi") else [])]
    assert net.phases()[0].usable(x).size == (x.size if rung == "unlabelled" else int(x.labelled.sum()))
    assert net.codes(x)[0].shape[1] == (12 if rung == "agnostic" else 6)
    assert all(
        p.grad is not None for n, p in net.named_parameters() if gradients(net.loss(x).total, net) and "club" not in n
    )


def test_validation_rows_are_scored_by_the_prediction():
    net, x = model().eval(), batch()
    found = net.loss(x)
    assert list(found.terms) == ["prediction"]
    torch.testing.assert_close(found.total.detach(), found.terms["prediction"])


def padded(x, fill, more):
    """The same rows with ``fill`` as padding (7 for tokens) and ``more`` steps of it."""

    def one(part):
        if part.lengths is None:
            return part
        values = F.pad(part.values, (0, more) if part.values.dim() == 2 else (0, 0, 0, more))
        beyond = torch.arange(values.shape[1]) >= part.lengths[:, None]
        beyond = beyond if values.dim() == 2 else beyond[..., None]
        return Inputs(values.masked_fill(beyond, fill if values.is_floating_point() else 7), part.lengths)

    return x._replace(inputs={name: one(part) for name, part in x.inputs.items()})


@pytest.mark.parametrize("agnostic", ["wsa", "wa", "mag", "mult", "transformer"])
@pytest.mark.parametrize("language", ["bert", "lstm"])
def test_padding_is_never_read(agnostic, language):
    if agnostic in ("wsa", "wa", "mag") or language == "bert":
        needs_text()
    net, x = model(agnostic=agnostic, language=language), batch()
    want, other = net.loss(x), net.loss(padded(x, 1e3, 2))
    torch.testing.assert_close(other.total, want.total)
    first, second = (gradients(loss.total, net) for loss in (want, other))
    assert all(torch.allclose(first[name], second[name], rtol=1e-6, atol=1e-9) for name in first)
    for row in range(3):
        one = x.take(torch.tensor([row]))
        cut = {
            n: Inputs(v.values[:, : v.lengths[0]], v.lengths) if v.lengths is not None else v
            for n, v in one.inputs.items()
        }
        torch.testing.assert_close(net.predict(Batch(cut, None, None, one.rows))[0], net.predict(x)[row])


@pytest.mark.parametrize("target", ["classes", "regression"])
@pytest.mark.parametrize("agnostic", ["mult", "transformer"])
def test_without_text(agnostic, target):
    data = made(text=False, target=target)
    net, x = model(data, agnostic=agnostic), batch(data)
    assert net.loss(x).total.isfinite()
    assert net.predict(x).shape == (x.size, 2 if target == "classes" else 1)
    assert list(net.representations(x)) == ["z_S", "z_frames", "z_vector", "fused"]
    with pytest.raises(ValueError, match="agnostic=wsa needs tokens"):
        model(data, agnostic="wsa")


def test_auto_is_wsa_with_text_and_mult_without():
    needs_text()
    from models.mird.encoders import MulTCode, ShiftedText

    assert isinstance(model(agnostic="auto").agnostic, ShiftedText)
    assert isinstance(model(made(text=False), agnostic="auto").agnostic, MulTCode)


@pytest.mark.parametrize("quirk", sorted(set(QUIRKS) - {"random_encoder", "fresh_codes"}))
def test_every_quirk_changes_the_loss(quirk):
    changes = {}
    if quirk == "text_padding":
        needs_text()
        changes = {"language": "bert"}
    net, other = (model(as_published=published, **changes) for published in ((), (quirk,)))
    x = batch()
    if quirk == "bare_log":
        x = x._replace(target=None, labelled=None)
        net, other = (model(as_published=published, log_floor=1e3) for published in ((), (quirk,)))
    for one in (net, other):
        with torch.no_grad():  # make estimates negative, log-variances larger than 1, and attention relevant
            one.club.p_logvar[2].bias.fill_(2.0)
            for name, parameter in one.named_parameters():
                if "backbone" in name and parameter.dim() > 1:
                    parameter.mul_(10)
    assert abs(net.loss(x).total - other.loss(x).total) > 1e-9
    assert abs(net.loss(x).total - model(as_published=("all",), **changes).loss(x).total) > 1e-9


def test_fresh_codes_draw_their_own_dropout():
    needs_text()
    net = model(agnostic="wsa", dropout=0.5, as_published=("fresh_codes",))
    club, x = net.phases()[1], batch()
    assert club.fixed is None
    assert club.loss(x).total != club.loss(x).total
    shared = model(agnostic="wsa", dropout=0.5).phases()[1]
    codes = shared.fixed(x)
    assert shared.loss(codes).total == shared.loss(codes).total


def test_random_encoder_leaves_the_checkpoint_aside(tmp_path):
    needs_text()
    import transformers

    torch.manual_seed(7)  # not the seed of the models
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    saved = transformers.BertModel(transformers.BertConfig(intermediate_size=8, **sizes))
    saved.save_pretrained(tmp_path)
    data = made()
    words = replace(data["words"], tokenizer=str(tmp_path))
    data = replace(data, modalities=(words, *data.modalities[1:]))
    text = TextConfig(str(tmp_path), dropout=0.0)
    want = saved.embeddings.word_embeddings.weight.double()
    for published, same in (((), True), (("random_encoder",), False)):
        net = model(data, agnostic="wsa", language="bert", text=text, as_published=published)
        found = net.agnostic.text.backbone.embeddings.word_embeddings.weight
        assert torch.equal(found, want) is same
        assert torch.equal(net.specific[0].text.backbone.embeddings.word_embeddings.weight, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agnostic": "bert"}, "agnostic must be one of auto, wsa"),
        ({"as_published": ("nothing",)}, "as_published must be one of random_encoder"),
        ({"ladder": "top"}, "ladder must be one of"),
        ({"mi_weight": -1.0}, "mi_weight must not be negative"),
        ({"log_floor": 0.0}, "log_floor must be positive"),
        ({"inner_steps": 0}, "inner_steps must be at least 1"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_text_modality_is_checked():
    with pytest.raises(ValueError, match="text_modality must be tokens of the data, words; got 'frames'"):
        model(text_modality="frames")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reconstruction": {"frames": -1.0}, "loss": "weighted"}, "reconstruction of frames must not be negative"),
        ({"reconstruction": {"nothing": 1.0}, "loss": "weighted"}, "reconstruction must be of words, frames, vector"),
        ({"reconstruction": {"frames": 2.0}}, "log-sum has none"),
        ({"mi_weights": {"agnostic-words": -1.0}}, "mi_weights of agnostic-words must not be negative"),
        ({"mi_weights": {"nothing": 1.0}}, "mi_weights must be of words-frames"),
    ],
)
def test_weights_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_one_modality_has_a_transformer_and_no_mult():
    data = made(text=False).choose(("frames",))
    assert type(model(data, agnostic="auto").agnostic).__name__ == "JointTransformer"
    with pytest.raises(ValueError, match="agnostic must be transformer for data of one modality, frames"):
        model(data, agnostic="mult")


def test_text_alone_has_nothing_to_shift_by():
    needs_text()
    data = made().choose(("words",))
    loss = model(data, agnostic="wsa").float().loss(data.batch(data.rows("train")))
    assert loss.total.isfinite()


def test_the_table_of_quirks_trains_those_that_act_and_names_the_others(tmp_path, monkeypatch, capsys):
    from models.__main__ import main
    from models.settings import from_dict

    data = made(text=False)
    data = replace(data, split=torch.arange(24) % 3)
    model_settings = {"name": "mird", "agnostic": "transformer", "dim": 4, "loss": "weighted", "inner_steps": 1}
    tree = {"model": model_settings | {"sizes": {"dim": 4, "heads": 2, "layers": 1}}, "data": {"name": "synthetic"}}
    from_dict(tree | {"training": {"epochs": 1, "batch_size": 8}}).save(tmp_path)
    monkeypatch.setattr("models.mird.analyses.load_data", lambda config: data)
    assert main(["analyse", "mird-quirks", "--out", str(tmp_path), "--quick"]) == 0
    found = json.loads((tmp_path / "mird-quirks.json").read_text())
    arms = [row["arm"] for row in found["rows"]]
    assert arms == ["none", "frame_padding", "unbounded_mi", "club_range", "fresh_codes", "all"]
    assert set(arms[1:-1]) | set(found["without_effect"]) == set(QUIRKS)
    assert all(math.isfinite(row["club"]["mean"]) for row in found["rows"])
    assert (tmp_path / "mird-quirks.svg").is_file() and "bare_log: no effect here" in capsys.readouterr().out
