"""Every format, read from files written as by their authors' code: values, lengths, splits, labels; and via .npz."""

import numpy as np
import pytest
import scipy.io

from models.data import formats
from models.data.convert import convert
from models.data.formats import avmnist_npy, csd, idx, matlab, mfn_hdf5, mult_pickle, npz, wav
from models.data.inspect import describe
from models.data.sources import read_file
from tests.models.data import writers
from tests.models.data.writers import WRITERS


def row(part, i):
    return part.values[part.offsets[i] : part.offsets[i + 1]]


@pytest.mark.parametrize("name", WRITERS)
def test_the_format_is_found_out_and_survives_npz_and_inspection(tmp_path, name):
    arrays = formats.read(WRITERS[name](tmp_path))
    assert arrays.format == name.split()[0]
    out = tmp_path / "out.npz"
    npz.write(arrays, out)
    again = formats.read(out)
    assert len(again) == len(arrays)
    assert list(again.modalities) == [*arrays.modalities, *arrays.optional]
    for key, part in {**arrays.modalities, **arrays.optional}.items():
        np.testing.assert_array_equal(again.modalities[key].values, part.values)
        np.testing.assert_array_equal(again.modalities[key].lengths(), part.lengths())
        assert again.modalities[key].shape == part.shape
    for ours, theirs in zip(again.labels.values(), arrays.labels.values(), strict=True):
        np.testing.assert_allclose(ours, theirs)
    assert list(again.kinds.values()) == list(arrays.kinds.values())
    assert again.texts == arrays.texts and again.ids == arrays.ids and set(arrays.notes) <= set(again.notes)
    if arrays.split is not None:
        np.testing.assert_array_equal(again.split, arrays.split)
    text = describe(out)
    for key in (*arrays.modalities, *arrays.optional, *arrays.texts, *list(arrays.labels)[1:], *arrays.notes):
        assert key in text
    assert "split" in text and ("odd: " in text or "nothing odd" in text)


def test_convert_says_what_it_did_and_leaves_nothing_behind_when_it_fails(tmp_path):
    path = WRITERS["affect"](tmp_path)
    said = convert(path, tmp_path / "out.npz")
    assert "14 rows from affect; modalities text, audio, vision; labels labels; train: audio: 1 infinite" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mosi_data.pkl", "out.npz"]
    before = (tmp_path / "out.npz").read_bytes()
    other = WRITERS["npz"](tmp_path)
    with pytest.raises(FileExistsError, match=r"out.npz exists: replace it with --overwrite"):
        convert(other, tmp_path / "out.npz")
    assert (tmp_path / "out.npz").read_bytes() == before
    assert "30 rows from npz" in convert(other, tmp_path / "out.npz", overwrite=True)
    with pytest.raises(ValueError, match=r"out must end in \.npz"):
        convert(path, tmp_path / "out.pkl")
    with pytest.raises(ValueError, match="out must differ from the input file"):
        convert(tmp_path / "out.npz", tmp_path / "out.npz")
    with pytest.raises(ValueError, match=r"format must be one of npz, irfl, .* got 'xls'"):
        convert(path, tmp_path / "second.npz", "xls")
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(tmp_path / "absent.pkl", tmp_path / "second.npz")
    assert not (tmp_path / "second.npz").exists()


def test_affect_pickles_start_at_the_first_word_and_lose_rows_without_text(tmp_path):
    content = writers.affect_content()
    content["train"]["text"][2] = 0
    content["test"]["vision"][1] = 0
    arrays = formats.read(writers.pickled(content, tmp_path / "mosi_data.pkl"))
    assert arrays.split.tolist() == [0] * 6 + [1] * 3 + [2] * 4
    assert any("1 rows without any text were left out" in note for note in arrays.notes)
    assert "trainvideo[2]" not in arrays.ids
    text = content["valid"]["text"][1]
    start = (text != 0).any(1).argmax()
    for name in ("text", "audio", "vision"):
        expected = content["valid"][name][1, start:].copy()
        expected[np.isinf(expected)] = 0
        np.testing.assert_array_equal(row(arrays.modalities[name], 7), expected.astype("f4"))
    assert arrays.modalities["vision"].lengths()[10] == 0 < arrays.modalities["text"].lengths()[10]
    assert any("vision: 1 rows" in note and "missing" in note for note in arrays.notes)


def test_binary_affect_labels_are_classes_and_scores_are_a_regression_target(tmp_path):
    content = writers.affect_content()
    assert read_file(writers.pickled(content, tmp_path / "mosi.pkl")).target.is_regression
    for part in content.values():
        part["labels"] = np.where(part["labels"] > 0, 1, -1)
    data = read_file(writers.pickled(content, tmp_path / "sarcasm.pkl"))
    assert data.target.is_classes and data.target.names == ("-1", "1") and set(data.labels.tolist()) == {0, 1}


def test_mult_pickles_are_cut_on_the_left_each_modality_by_itself(tmp_path):
    content = writers.mult_content()
    arrays = formats.read(writers.pickled(content, tmp_path / "mosi_data_noalign.pkl"))
    assert arrays.format == mult_pickle.NAME and arrays.ids[0] == "train0_0_1"
    for name in ("text", "audio", "vision"):
        values = content["train"][name][0]
        np.testing.assert_array_equal(row(arrays.modalities[name], 0), values[(values != 0).any(1).argmax() :])
    lengths = {name: part.lengths().tolist() for name, part in arrays.modalities.items()}
    assert lengths["audio"] != lengths["text"]


def test_padding_on_the_other_side_is_found_and_said(tmp_path):
    content = writers.mult_content()
    for part in content.values():
        part["audio"] = part["audio"][:, ::-1]
    arrays = formats.read(writers.pickled(content, tmp_path / "x.pkl"))
    assert any("audio: padded on the right" in note for note in arrays.notes)
    values = content["train"]["audio"][0]
    np.testing.assert_array_equal(row(arrays.modalities["audio"], 0), values[(values != 0).any(1)])


def test_iemocap_becomes_four_labels_of_two_classes(tmp_path):
    content = writers.affect_content()
    for part in content.values():
        part["labels"] = np.eye(2)[np.arange(len(part["labels"]) * 4).reshape(-1, 4) % 2]
    path = writers.pickled(content, tmp_path / "iemocap_data.pkl")
    arrays = formats.read(path)
    assert list(arrays.labels) == list(mult_pickle.EMOTIONS)
    assert arrays.labels["happy"].tolist() == [1] * 14 and arrays.labels["neutral"].tolist() == [0] * 14
    with pytest.raises(ValueError, match="at least two classes"):
        read_file(path, target="happy")


def test_mmsa_lengths_come_from_the_file_and_the_mask(tmp_path):
    content = writers.mmsa_content()
    arrays = formats.read(writers.pickled(content, tmp_path / "unaligned_50.pkl"))
    assert arrays.modalities["audio"].lengths()[:7].tolist() == content["train"]["audio_lengths"]
    mask = content["train"]["text_bert"][:, 1]
    assert arrays.modalities["text"].lengths()[:7].tolist() == mask.sum(1).tolist()
    tokens = arrays.optional["tokens"]
    np.testing.assert_array_equal(row(tokens, 0), content["train"]["text_bert"][0, 0][mask[0] > 0])
    assert arrays.groups is not None and len(np.unique(arrays.groups)) == 8


def test_aligned_mmsa_keeps_equal_lengths(tmp_path):
    content = writers.mmsa_content(aligned=True)
    content["train"]["audio"][0, -1] = content["train"]["vision"][1, 0] = 0
    arrays = formats.read(writers.pickled(content, tmp_path / "aligned_50.pkl"))
    lengths = [part.lengths().tolist() for part in arrays.modalities.values()]
    assert lengths[0] == lengths[1] == lengths[2]


def test_optional_modalities_and_texts_are_used_when_named(tmp_path):
    path = WRITERS["mmsa"](tmp_path)
    assert read_file(path).names == ("text", "audio", "vision")
    data = read_file(path, modalities=("tokens", "raw_text"), target="classification_labels")
    assert data.names == ("tokens", "raw_text") and data["raw_text"].is_tokens and data.target.size == 3
    with pytest.raises(ValueError, match="'smell' is missing; the file has text, audio, vision, tokens, raw_text"):
        read_file(path, modalities=("smell",))


def test_mimic_has_multibenchs_split_and_tasks(tmp_path):
    content = writers.mimic_content()
    arrays = formats.read(writers.pickled(content, tmp_path / "im.pk"))
    assert next(iter(arrays.labels)) == "icd9_7"
    np.testing.assert_array_equal(arrays.labels["icd9_3"], content["y_icd9"][:, 3])
    deaths = content["adm_labels_all"]
    expected = [next((k for k in range(1, 6) if line[k] > 0), 0) for line in deaths]
    assert arrays.labels["mortality"].tolist() == expected
    import random

    order = list(range(40))
    random.seed(10)
    random.shuffle(order)
    assert sorted(order[:4]) == np.flatnonzero(arrays.split == 1).tolist()
    assert sorted(order[4:8]) == np.flatnonzero(arrays.split == 2).tolist()
    assert arrays.modalities["static"].values[1, 1] == 0 and any("NaN" in note for note in arrays.notes)


def test_acl17_videos_become_utterances(tmp_path):
    train, train_labels, test, test_labels, _, train_lengths, test_lengths = writers.acl17_content()
    arrays = formats.read(WRITERS["acl17"](tmp_path))
    lengths = [*train_lengths, *test_lengths]
    assert np.bincount(arrays.groups).tolist() == lengths
    assert np.bincount(arrays.split).tolist() == [sum(train_lengths), 0, sum(test_lengths)]
    expected = np.concatenate([video[:n] for video, n in zip([*train, *test], lengths, strict=True)])
    np.testing.assert_allclose(arrays.modalities["audio"].values, expected, rtol=1e-6)
    expected = np.concatenate([row[:n] for row, n in zip([*train_labels, *test_labels], lengths, strict=True)])
    assert arrays.labels["labels"].tolist() == expected.tolist()
    assert arrays.ids[:2] == ("train0[0]", "train0[1]" if train_lengths[0] > 1 else "train1[0]")
    for place, value, message in (
        (1, train_labels[:, 1:], r"train has 5 videos of 4 utterances, but labels of shape \(5, 3\)"),
        (5, [9, *train_lengths[1:]], r"train lengths must be whole numbers up to 4, got \d+ to 9"),
        (2, test[:, :, 1:], "must have equal features, got 3 and 2"),
    ):
        content = list(writers.acl17_content())
        content[place] = value
        with pytest.raises(ValueError, match=message):
            formats.read(writers.pickled(tuple(content), tmp_path / "audio.pickle"))
    writers.pickled({"train": 1}, tmp_path / "audio.pickle")
    with pytest.raises(ValueError, match=r"must be a tuple \(train, train labels"):
        formats.read(tmp_path / "audio.pickle", "acl17")


def test_acl17s_original_file_is_the_audio_of_mosi(data_dir):
    arrays = formats.read(data_dir / "original" / "mosi_acl17" / "audio.pickle")
    assert np.bincount(arrays.split).tolist() == [1447, 0, 752] and len(np.unique(arrays.groups)) == 93
    with np.load(data_dir / "mosi_utterance.npz") as content:
        known = {tuple(row) for row in content["audio"].astype(np.float32).round(3).tolist()}
    found = {tuple(row) for row in arrays.modalities["audio"].values.round(3).tolist()}
    assert found == known


def test_computational_sequences_are_cut_at_the_labelled_intervals(tmp_path):
    arrays = csd.read(WRITERS["csd folder"](tmp_path))
    assert arrays.labels["Opinion Segment Labels"].tolist() == [1.5, -2.0] * 3
    assert arrays.modalities["words"].lengths().tolist() == [2, 3] * 3
    assert arrays.modalities["COVAREP"].lengths().tolist() == [4, 6] * 3
    features = writers.csd_entries(1.0, 2, 1)["vidB"][0]
    np.testing.assert_array_equal(row(arrays.modalities["words"], 3), features[2:5])
    assert arrays.modalities["COVAREP"].values[0, 0] == 0 and any("infinite" in note for note in arrays.notes)
    assert arrays.groups.tolist() == [0, 0, 1, 1, 2, 2]


def test_mfn_padding_is_what_no_modality_uses(tmp_path):
    path = WRITERS["mfn"](tmp_path)
    arrays = mfn_hdf5.read(path)
    assert arrays.modalities["audio"].lengths().tolist() == arrays.modalities["video"].lengths().tolist()
    assert arrays.modalities["audio"].lengths().max() == 5 and arrays.modalities["audio"].lengths().min() < 5
    (path / "video_test.h5").unlink()
    again = mfn_hdf5.read(path)
    assert again.modalities["video"].lengths()[-4:].tolist() == [0] * 4
    assert any("video: missing in all test rows" in note for note in again.notes)
    (path / "y_test.h5").unlink()
    with pytest.raises(ValueError, match=r"no labels y_test\.h5"):
        mfn_hdf5.read(path)


def test_mfn_originals(data_dir):
    arrays = mfn_hdf5.read(data_dir / "original" / "mmmo")
    with np.load(data_dir / "mmmo.npz") as expected:
        np.testing.assert_array_equal(arrays.labels["y"], np.r_[expected["y_valid"], expected["y_test"]])
        audio = np.concatenate([expected["audio_valid"], expected["audio_test"]])
    part = arrays.modalities["audio"]
    for i in (0, 50, 119):
        start = (audio[i] != 0).any(1).argmax()
        assert (audio[i, start : start + part.lengths()[i]] == row(part, i)).all()
        assert not audio[i, start + part.lengths()[i] :].any()
    assert arrays.split.tolist() == [1] * 40 + [2] * 80 and any(
        "no train rows" in note for note in [describe(arrays.path)]
    )
    labels = mfn_hdf5.read(data_dir / "original" / "mosi_labels")
    assert np.bincount(labels.split).tolist() == [1284, 229, 686]


def test_idx_originals(data_dir):
    arrays = idx.read(data_dir / "original" / "idx")
    with np.load(data_dir / "mnist.npz") as expected:
        np.testing.assert_allclose(
            arrays.modalities["image"].values, expected["x_test"].reshape(10000, -1) / 255, atol=1e-6
        )
        np.testing.assert_array_equal(arrays.labels["labels"], expected["y_test"])
    assert (arrays.split == 2).all() and arrays.modalities["image"].shape == (28, 28)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "i4", "f4", "f8"])
def test_idx_reads_every_type(tmp_path, dtype):
    values = np.arange(-3, 3).reshape(2, 3).astype(dtype)
    (tmp_path / "x-idx2").write_bytes(writers.idx_bytes(values))
    np.testing.assert_array_equal(idx.read_array(tmp_path / "x-idx2"), values)


def test_avmnist_has_multibenchs_split_and_scale(tmp_path):
    path = WRITERS["avmnist"](tmp_path)
    arrays = avmnist_npy.read(path)
    assert np.bincount(arrays.split).tolist() == [22, 2, 6]
    assert arrays.modalities["audio"].shape == (12, 12) and arrays.modalities["image"].shape == (28, 28)
    raw = np.load(path / "image" / "train_data.npy")
    np.testing.assert_allclose(arrays.modalities["image"].values[:24], raw / 255, atol=1e-6)


def test_wav_spectra_are_those_of_the_prepared_set(data_dir):
    arrays = wav.read(data_dir / "original" / "wav")
    with np.load(data_dir / "fsdd_logmel40.npz") as prepared:
        jackson = prepared["speaker_names"].tolist().index("jackson")
        for i, name in enumerate(arrays.ids):
            known = (
                (prepared["label"] == int(name[0])) & (prepared["speaker"] == jackson) & (prepared["rec_index"] == 0)
            )
            at = int(np.flatnonzero(known)[0])
            expected = prepared["logmel"][prepared["offset"][at] : prepared["offset"][at + 1]].astype("f4")
            # The prepared data set stores 11 bits of numbers up to 12.
            np.testing.assert_allclose(row(arrays.modalities["audio"], i), expected, atol=6e-3)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
def test_wav_scales_every_sample_type_alike(tmp_path, dtype):
    tone = 0.5 * np.sin(np.arange(800) / 5)
    scale = {"u1": 128, "i2": 2**15, "i4": 2.0**31, "f4": 1}[dtype]
    stored = (tone * scale + (128 if dtype == "u1" else 0)).astype(dtype)
    from scipy.io import wavfile

    wavfile.write(tmp_path / "x.wav", 8000, np.stack([stored, stored], 1))
    rate, samples = wav.read_samples(tmp_path / "x.wav")
    assert rate == 8000
    np.testing.assert_allclose(samples, tone, atol=1.01 / 128 if dtype == "u1" else 1e-4)


def test_matlab_originals_are_the_prepared_recordings(data_dir):
    from models.data.sources import utd_mhad

    made = utd_mhad.from_mat(data_dir / "original" / "utd_mhad_mat")
    prepared = npz.read(data_dir / "utd_mhad.npz")
    with np.load(data_dir / "utd_mhad.npz") as raw:
        keys = np.stack([raw["label"] + 1, raw["subject"], raw["trial"]], 1)
    rows = [int(np.flatnonzero((keys == key).all(1))[0]) for key in ((1, 1, 1), (2, 1, 1), (27, 1, 1))]
    for name in utd_mhad.MODALITIES:
        expected = prepared.modalities[name].select(np.array(rows))
        np.testing.assert_array_equal(made.modalities[name].offsets, expected.offsets)
        # Depth values halfway between two units may be rounded up or down.
        np.testing.assert_allclose(
            made.modalities[name].values, expected.values, atol=1.01 / 255 if name == "depth" else 1e-5
        )
    assert made.labels["label"].tolist() == [1, 2, 27] and made.split.tolist() == [0, 0, 0]


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_variables_are_those_that_scipy_reads(tmp_path, compressed):
    generator = np.random.default_rng(0)
    kinds = ("f8", "f4", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
    content = {f"v_{kind}": (100 * generator.random((3, 2, 4))).astype(kind) for kind in kinds}
    content |= {"one": np.array([[7]]), "yes": np.array([[True, False]]), "short": np.array([[1, 2, 3]], "u1")}
    content |= {"empty": np.zeros((0, 3)), "special": np.array([[np.nan, -np.inf]])}
    scipy.io.savemat(tmp_path / "x.mat", content, do_compression=compressed)
    ours, theirs = matlab.read_variables(tmp_path / "x.mat"), scipy.io.loadmat(tmp_path / "x.mat")
    assert list(ours) == list(content)
    for name, values in ours.items():
        assert values.dtype == (bool if name == "yes" else theirs[name].dtype), name
        np.testing.assert_array_equal(values, theirs[name])


def test_matlab_originals_are_what_scipy_reads(data_dir):
    for file in sorted((data_dir / "original" / "utd_mhad_mat").glob("a1_*.mat")):
        ((name, values),) = matlab.read_variables(file).items()
        np.testing.assert_array_equal(values, scipy.io.loadmat(file)[name])


def test_matlab_files_with_rows_last_are_turned_round(tmp_path):
    arrays = matlab.read(writers.matlab(tmp_path))
    raw = matlab.read_variables(tmp_path / "data.mat")
    assert arrays.modalities["X"].values.shape == (10, 4)
    np.testing.assert_allclose(row(arrays.modalities["Z"], 2), raw["Z"][:, :, 2], rtol=1e-6)
    assert any("Z: rows came last" in note for note in arrays.notes)


def test_csv_columns_form_modalities(tmp_path):
    arrays = formats.read(WRITERS["csv"](tmp_path))
    assert {name: part.values.shape for name, part in arrays.modalities.items()} == {
        "audio": (12, 2),
        "text": (12, 2),
        "table": (12, 1),
    }
    assert arrays.classes["label"] == ("a", "b") and arrays.texts["remark"][3] == "good 3" and arrays.ids[2] == "r2"
    assert np.bincount(arrays.split).tolist() == [6, 3, 3]


def test_csv_without_a_header(data_dir):
    arrays = formats.read(data_dir / "original" / "mosi_acl17" / "transcripts.csv")
    assert len(arrays) == 2199 and arrays.texts["c1"][0] == "ANYHOW IT WAS REALLY GOOD"
    assert arrays.modalities["table"].values[:3, 1].tolist() == [1, 0, 0]


def test_irfl_keeps_phrases_together(tmp_path):
    path = WRITERS["irfl"](tmp_path)
    arrays = formats.read(path)
    assert arrays.texts["distractors"][0].splitlines() == [f"https://a/{i}.jpg" for i in (1, 2, 3)]
    data = read_file(path, modalities=("phrase",))
    for phrase in range(4):
        assert len(set(data.split[data.groups == phrase].tolist())) == 1
    assert data.target.names == ("metaphor", "simile")


def test_mustard_original(data_dir):
    arrays = formats.read(data_dir / "original" / "mustard_sarcasm_data.json")
    with np.load(data_dir / "mustard_text.npz") as prepared:
        order = [prepared["utt_id"].tolist().index(name) for name in arrays.ids]
        assert prepared["utterance"][order].tolist() == arrays.texts["utterance"]
        assert prepared["context"][order].tolist() == arrays.texts["context"]
        np.testing.assert_array_equal(prepared["sarcasm"][order], arrays.labels["sarcasm"])


def test_tokens_are_numbered_on_training_rows():
    from models.data.assemble import tokens

    part = tokens(["The cat, the dog", "", "a bird"], np.array([True, True, False]))
    assert part.words == ("<pad>", "<unk>", "the", ",", "cat", "dog")
    assert part.values.tolist() == [2, 4, 3, 2, 5, 1, 1] and part.lengths().tolist() == [5, 0, 2]
