"""XLNet as a text encoder: weights from a checkpoint, padding as in the public code, and where the shift is applied."""

from __future__ import annotations

import pytest
import torch

from models.batch import Inputs
from models.data import Modality
from models.layers.mag import AdaptationGate
from models.layers.text import TextConfig, TextEncoder, load_backbone
from models.layers.xlnet import XLNetEncoder
from tests.models.layers.checks import assert_padding_tokens_are_never_read

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
SIZES = {"d_model": 8, "n_layer": 3, "n_head": 2, "d_inner": 12}
SMALL = TextConfig(hidden=8, layers=3, heads=2, intermediate=12, dropout=0.0)
VOCABULARY = 11


def tokens(tokenizer="", vocabulary=VOCABULARY):
    return Modality("said", torch.tensor([1, 2, 3]), torch.tensor([0, 3]), vocabulary=vocabulary, tokenizer=tokenizer)


def batch(lengths=(3, 5, 1), steps=5, fill=0):
    torch.manual_seed(1)
    lengths = torch.tensor(lengths)
    values = torch.randint(1, VOCABULARY, (len(lengths), steps))
    return Inputs(values.masked_fill(torch.arange(steps) >= lengths[:, None], fill), lengths)


def enlarged(net):
    with torch.no_grad():  # with the small initial weights, attention would have almost no effect
        for parameter in net.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return net.double().eval()


def encoder(**changes):
    torch.manual_seed(0)
    return enlarged(XLNetEncoder(tokens(), TextConfig(**{**vars(SMALL), **changes})))


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a tiny XLNet; returns its folder."""
    torch.manual_seed(3)
    transformers.XLNetModel(transformers.XLNetConfig(vocab_size=VOCABULARY, **SIZES)).save_pretrained(tmp_path)
    return tmp_path


def padded_left(net, x, shift=None):
    """The summary as MAG-XLNet's public code computes it: all rows have one length, with padding first and CLS last."""
    lengths = x.lengths.tolist()
    steps = max(lengths) + 2
    ids = torch.tensor([[0] * (steps - n - 2) + [*row[:n].tolist(), VOCABULARY, VOCABULARY + 1]
                        for row, n in zip(x.values, lengths, strict=True)])  # fmt: skip
    segments = torch.tensor([[3] * (steps - n - 2) + [0] * (n + 1) + [2] for n in lengths])
    mask = (segments != 3).double()
    layer = net.backbone.layer[1]
    plain = layer.forward
    if shift is not None:
        layer.forward = lambda h, *rest, **more: plain(shift(h.transpose(0, 1)).transpose(0, 1), *rest, **more)
    try:
        states = net.backbone(input_ids=ids, attention_mask=mask, token_type_ids=segments).last_hidden_state
    finally:
        layer.forward = plain
    return net.summary(states[:, -1]).tanh()


def test_every_weight_is_the_checkpoints(checkpoint):
    name = str(checkpoint)
    net = XLNetEncoder(tokens(name), TextConfig(name))
    found = safetensors.load_file(checkpoint / "model.safetensors")
    mine = net.backbone.state_dict()
    assert found.keys() == mine.keys()
    for key, value in found.items():
        assert torch.equal(mine[key], value), key
    assert net.marks == () and net.limit is None
    assert load_backbone(name, dropout=0.3, kind="xlnet").config.dropout == 0.3


def test_weights_that_would_be_random_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    weights = safetensors.load_file(path)
    del weights["layer.1.rel_attn.q"]
    safetensors.save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not have layer.1.rel_attn.q, which would be random"):
        load_backbone(str(checkpoint), kind="xlnet")


def test_a_checkpoint_of_the_other_kind_is_named(checkpoint, tmp_path):
    name = str(checkpoint)
    with pytest.raises(ValueError, match=f"text.name: the checkpoint '{name}' is XLNet, which the model mag-xlnet"):
        TextEncoder(tokens(name), TextConfig(name))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    other = str(tmp_path / "bert")
    transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(other)
    with pytest.raises(ValueError, match=f"text.name: the checkpoint '{other}' is no XLNet; mag-bert"):
        XLNetEncoder(tokens(other), TextConfig(other))


def test_features_are_those_of_padding_on_the_left():
    net, x = encoder(), batch()
    torch.testing.assert_close(net(x), padded_left(net, x))
    gate = AdaptationGate(8, (4,), dropout=0.0).double()
    frames = torch.randn(3, 7, 4, dtype=torch.float64)
    steps = [n + 2 for n in x.lengths.tolist()]
    left = torch.stack([torch.nn.functional.pad(f[:n], (0, 0, 7 - n, 0)) for f, n in zip(frames, steps, strict=True)])

    def shift(words):
        return gate(words, Inputs(frames, words.lengths))

    want = padded_left(net, x, lambda words: gate(words, left))
    assert (want - net(x)).abs().max() > 1e-3
    torch.testing.assert_close(net(x, shift), want)


@pytest.mark.parametrize("readout", ["pooler", "mean"])
def test_padding_is_never_read(readout):
    assert_padding_tokens_are_never_read(encoder(readout=readout), batch)


def test_the_shift_sees_the_states_behind_the_first_layer():
    net, x, seen = encoder(), batch(), []

    def shift(words):
        seen.append(words)
        return words.values

    torch.testing.assert_close(net(x, shift), net(x), rtol=0, atol=0)
    assert torch.equal(seen[0].lengths, x.lengths + 2) and seen[0].values.shape == (3, 7, 8)
    first = []
    handle = net.backbone.layer[0].register_forward_hook(lambda module, given, found: first.append(found[0]))
    net(x, shift)
    handle.remove()
    assert torch.equal(first[0].transpose(0, 1), seen[1].values)
    assert not net.backbone.layer[1]._forward_pre_hooks
    with pytest.raises(ZeroDivisionError):
        net(x, lambda words: 1 / 0)
    assert not net.backbone.layer[1]._forward_pre_hooks


def test_a_gate_without_a_shift_is_xlnet_on_normed_states_and_a_closed_one_changes_nothing():
    net, x = encoder(), batch()
    gate = AdaptationGate(8, (4,), dropout=0.0).double()
    frames = torch.randn(3, 7, 4, dtype=torch.float64)
    for linear in gate.shifts:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    found = net(x, lambda words: gate(words, Inputs(frames, words.lengths)))
    assert torch.equal(found, net(x, lambda words: gate.norm(words.values)))
    gate.norm = torch.nn.Identity()
    assert torch.equal(net(x, lambda words: gate(words, Inputs(frames, words.lengths))), net(x))


def test_a_missing_text_is_sep_and_cls():
    net = encoder()
    found = [net(Inputs(batch(fill=fill).values, torch.tensor([0, 5, 1]))) for fill in (0, 3)]
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1])


def test_every_weight_but_that_of_pretraining_learns():
    net = encoder().train()
    net(batch()).square().sum().backward()
    assert {name for name, p in net.named_parameters() if p.grad is None} == {"backbone.mask_emb"}
    assert not net.backbone.mask_emb.requires_grad


def test_what_xlnet_does_not_have_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"text\.readout must be pooler or mean for XLNet"):
        encoder(readout="first")
    with pytest.raises(ValueError, match=r"text\.layers must be at least 2 for XLNet"):
        encoder(layers=1)
    name = str(checkpoint)
    with pytest.raises(ValueError, match=f"set data.tokenizer={name}"):
        XLNetEncoder(tokens(), TextConfig(name))
    with pytest.raises(ValueError, match="has 12 tokens, the encoder knows 11"):
        XLNetEncoder(tokens(name, 12), TextConfig(name))


def test_texts_are_read_as_tokens_sep_and_cls(tmp_path, monkeypatch):
    from models.batch import Target
    from models.data import Dataset
    from models.data.tokenizer import tokenised

    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>"]
    pieces = [(word, 0.0) for word in special] + [(word, -1.0) for word in ("▁", "▁good", "▁movie")]
    tokenizer = transformers.XLNetTokenizer(vocab=[*pieces, *((letter, -5.0) for letter in "abcdefg")])
    tokenizer.save_pretrained(tmp_path)
    transformers.XLNetModel(transformers.XLNetConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(tmp_path)
    said = ("good", "good movie good", "")
    counts = torch.tensor([0, *(len(text.split()) for text in said)]).cumsum(0)
    words = Modality("said", torch.zeros(int(counts[-1]), dtype=torch.int64), counts, texts=said)
    name = str(tmp_path)
    data = tokenised(Dataset("said", (words,), None, Target.none(), torch.zeros(3, dtype=torch.int64)), name)
    net, seen = XLNetEncoder(data["said"], TextConfig(name)).eval(), {}
    monkeypatch.setattr(net.backbone, "forward", lambda plain=net.backbone.forward, **given: seen.update(given) or
                        plain(**given))  # fmt: skip
    assert net(data.batch(torch.arange(3)).inputs["said"]).isfinite().all()
    ids = {word: number for number, (word, _) in enumerate(pieces)}
    good, movie, sep, cls, pad = (ids[word] for word in ("▁good", "▁movie", "<sep>", "<cls>", "<pad>"))
    assert seen["input_ids"].tolist() == [[good, sep, cls, pad, pad], [good, movie, good, sep, cls], [pad] * 5]
    assert seen["token_type_ids"].tolist() == [[0, 0, 2, 3, 3], [0, 0, 0, 0, 2], [2, 3, 3, 3, 3]]
    assert seen["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]
