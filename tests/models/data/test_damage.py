"""Damaged and unusual files: one sentence that names the file and the key, or a repair that is reported."""

import gzip
import json
import struct
import sys
import warnings
import zipfile

import h5py
import numpy as np
import pytest
import scipy.io
from scipy.io import wavfile

from models.data import formats
from models.data.convert import convert
from models.data.formats import checks, hdf5, idx, matlab, mustard_json, npy, npz, repairs, wav
from models.data.inspect import describe
from models.data.sources import read_file
from tests.models.data import writers
from tests.models.data.writers import WRITERS

OTHERS = ("csd folder", "mfn", "idx", "avmnist", "declare-lab", "wav", "matlab plain")
FILES = [name for name in WRITERS if name not in OTHERS]


def one_sentence(error, path):
    text = str(error.value)
    return text.startswith(str(path)) and "\n" not in text and len(text) < 400


@pytest.mark.parametrize("name", FILES)
def test_empty_web_page_and_pointer_files_are_named(tmp_path, name):
    path = WRITERS[name](tmp_path)
    for content, message in (
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>Quota exceeded</body></html>", "is a web page, not data"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "is a Git LFS pointer"),
    ):
        path.write_bytes(content)
        for format in (None, name.split()[0]):
            with pytest.raises(ValueError, match=message) as error:
                formats.read(path, format)
            assert one_sentence(error, path)


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("csv", "irfl")])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_truncated_files_are_named(tmp_path, name, share):
    path = WRITERS[name](tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"complete|damaged|can be read") as error:
        formats.read(path)
    assert one_sentence(error, path)


def test_a_file_in_no_known_format_and_a_pickle_of_no_known_layout_are_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ValueError, match="is in no format that is known here; known are npz, irfl, csv"):
        formats.read(path)
    path = writers.pickled({"features": np.ones(3)}, tmp_path / "x.pkl")
    with pytest.raises(ValueError, match=r"no layout that is known here .* it holds features"):
        formats.read(path)


def test_names_in_a_file_write_nothing_to_the_terminal(tmp_path, caplog):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04\x8c\x02o\n\x8c\x05\x1b[31m\x93.")
    with pytest.raises(ValueError, match="asks for") as error:
        formats.read(path)
    assert one_sentence(error, path) and str(error.value).isprintable()
    strange = "smell\n\x1b[2J"
    path = write(tmp_path, **{strange: np.ones((30, 2)), "more\x07": np.ones(5)})
    assert all(line.isprintable() for line in describe(path).splitlines())
    assert convert(path, tmp_path / "out.npz").isprintable()
    read_file(path)
    assert all(record.getMessage().isprintable() for record in caplog.records) and caplog.records
    with pytest.raises(ValueError, match="is missing") as error:
        read_file(path, modalities=("taste",))
    assert one_sentence(error, path) and str(error.value).isprintable()


AFFECT = {
    "wrong key": (lambda part: part.pop("vision"), r"split 'train' has no 'vision'; it has audio, text, labels, id"),
    "no labels": (lambda part: part.pop("labels"), r"split 'train' has no 'labels'"),
    "NaN": (
        lambda part: part["text"].__setitem__((1, 5, 0), np.nan),
        r"'text' holds 1 values that are not finite \(NaN\)",
    ),
    "text for numbers": (lambda part: part.update(audio=np.array([["a"]])), r"'audio' must be numeric, it holds <U1"),
    "objects": (lambda part: part.update(audio=np.array([{}], object)), r"'audio' must be numeric, it holds objects"),
    "rows": (lambda part: part.update(labels=part["labels"][1:]), r"'labels' has 6 rows"),
    "steps": (lambda part: part.update(vision=part["vision"][:, 1:]), r"equal rows and steps"),
    "axes": (lambda part: part.update(vision=part["vision"][:, 0]), r"'vision' must be \[rows, steps, features\]"),
    "no rows": (lambda part: part.update({key: value[:0] for key, value in part.items()}), "split 'train' has no rows"),
    "a list": (None, "split 'train' must be a dictionary of arrays, it is a list"),
}


@pytest.mark.parametrize("case", AFFECT)
def test_what_an_affect_pickle_lacks_is_named_with_its_split(tmp_path, case):
    change, message = AFFECT[case]
    content = writers.affect_content()
    if change is None:
        content["train"] = [content["train"]]
    else:
        change(content["train"])
    path = writers.pickled(content, tmp_path / "x.pkl")
    if case == "no rows":
        assert any(message in note for note in formats.read(path, "affect").notes)
        return
    with pytest.raises(ValueError, match=message) as error:
        formats.read(path, "affect")
    assert one_sentence(error, path)


def test_a_fourth_modality_of_an_affect_pickle_is_used_and_other_keys_are_named(tmp_path):
    content = writers.affect_content()
    for part in content.values():
        part["depth"] = part["audio"] * 2
        part["speaker"] = np.arange(len(part["id"]))
    arrays = formats.read(writers.pickled(content, tmp_path / "x.pkl"))
    assert list(arrays.modalities) == ["text", "audio", "vision", "depth"]
    assert any("not used: speaker" in note for note in arrays.notes)


def test_missing_test_rows_are_said(tmp_path):
    content = writers.affect_content()
    del content["test"]
    arrays = formats.read(writers.pickled(content, tmp_path / "x.pkl"))
    assert "there are no test rows" in arrays.notes
    data = read_file(tmp_path / "x.pkl")
    with pytest.raises(ValueError, match="has no test rows"):
        data.rows("test")


@pytest.mark.parametrize("stated", [[9, 1, 1, 1, 1, 1, 1], [-1] * 7, [1.5] * 7, [1] * 6])
def test_stated_lengths_must_fit(tmp_path, stated):
    content = writers.mmsa_content()
    content["train"]["audio_lengths"] = stated
    with pytest.raises(ValueError, match="'audio_lengths' must"):
        formats.read(writers.pickled(content, tmp_path / "x.pkl"))


def test_stated_lengths_of_zero_and_frames_of_zeros_are_a_missing_modality(tmp_path):
    content = writers.mmsa_content()
    content["train"]["audio_lengths"][0] = 0
    content["train"]["audio"][0] = 0
    content["train"]["vision"][1] = 0
    data = read_file(writers.pickled(content, tmp_path / "x.pkl"))
    assert data["audio"].lengths()[0] == 0 and data["vision"].lengths()[1] == 0
    batch = data.batch(data.rows("train"))
    assert batch.inputs["audio"].present[:2].tolist() == [False, True]


BROKEN = {
    "wrong rows": ({"text": np.ones((29, 4))}, "29 rows"),
    "not finite": ({"text": np.full((30, 4), np.nan)}, "'text' holds 120 values that are not finite"),
    "infinite": ({"text": np.full((30, 4), -np.inf)}, "infinite"),
    "beyond single precision": ({"text": np.full((30, 4), 1e300)}, "infinite"),
    "offsets too short": ({"off_pose": np.arange(31)}, "off_pose must run"),
    "offsets fall": ({"off_pose": np.r_[0, 5, 3, np.full(28, 105)]}, "off_pose must"),
    "offsets of nothing": ({"off_smell": np.arange(31)}, "has 'off_smell' but no array 'smell'"),
    "split length": ({"split": np.zeros(3, int)}, "'split' has 3 rows"),
    "split codes": ({"split": np.full(30, 5)}, "split must be"),
    "no train rows": ({"split": np.ones(30, int)}, "no train rows"),
    "one class": ({"y": np.zeros(30)}, "at least two classes"),
    "no label at all": ({"y": np.full(30, np.nan)}, "NaN in every row"),
    "infinite label": ({"y": np.r_[np.inf, np.zeros(29)]}, "'y' holds 1 values that are not finite"),
    "objects": ({"text": np.array([{}] * 30, dtype=object)}, "pickle"),
    "tokens below zero": ({"off_pose": np.arange(31), "pose": -np.ones(30, int)}, "tokens 'pose'"),
    "all missing": ({"pose": np.zeros((0, 3)), "off_pose": np.zeros(31, int)}, "pose"),
    "swapped picture": (
        {"text": np.zeros((30, 4, 6), np.uint16), "shape_text": np.array([6, 4])},
        r"shape_text is \(6, 4\), but the pictures 'text' are \(4, 6\) \(height and width are swapped\)",
    ),
    "negative picture": ({"text": -np.ones((30, 4)), "shape_text": np.array([2, 2])}, "must not be negative"),
    "present": ({"present_text": np.ones(30)}, "present_text must be bool"),
    "present of sequences": ({"present_pose": np.ones(29, bool)}, r"present_pose must be bool \[30\], got bool"),
    "lengths": ({"len_pose": np.ones(30, int)}, "len_pose and off_pose disagree"),
    "lengths of vectors": ({"len_text": np.ones(30, int)}, r"len_text must belong to sequences \[N, T, D\]"),
    "lengths beyond the steps": (
        {"text": np.ones((30, 3, 2)), "len_text": np.full(30, 4)},
        "len_text must lie between 0 and 3, the steps of 'text'; got 4 to 4",
    ),
    "fractional lengths": ({"text": np.ones((30, 3, 2)), "len_text": np.ones(30)}, "len_text must be integers"),
    "kind": ({"kind": np.array("ordinal")}, "classes or regression, got 'ordinal'"),
}  # fmt: skip


def write(tmp_path, **changes):
    content = writers.npz_content() | changes
    path = tmp_path / "data.npz"
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return path


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.replace(" ", "-"))
def test_a_broken_npz_is_explained(tmp_path, case):
    changes, message = BROKEN[case]
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_file(path)
    assert one_sentence(error, path)


def test_a_file_without_labels_is_for_models_that_need_none(tmp_path, caplog):
    path = write(tmp_path, y=None)
    data = read_file(path)
    assert data.target.kind == "none" and data.labels is None and len(data.rows("test"))
    assert "no labels y, it has pose, text: only models that need none" in caplog.text
    with pytest.raises(ValueError, match="no labels mood; it has pose, text") as error:
        read_file(path, target="mood")
    assert one_sentence(error, path)


def test_labels_under_another_name_are_used_and_said(tmp_path, caplog):
    y = writers.npz_content()["y"]
    data = read_file(write(tmp_path, y=None, labels=y))
    assert data.labels.tolist() == y.tolist() and "labels are under 'labels'" in caplog.text
    with pytest.raises(ValueError, match="must have its labels under 'y': it has label, labels"):
        read_file(write(tmp_path, y=None, labels=y, label=y))


def test_regression_targets_are_taken_unless_classes_are_needed(tmp_path):
    path = write(tmp_path, y=np.linspace(0, 1, 30))
    assert read_file(path).target.is_regression
    with pytest.raises(ValueError, match="must hold integer class labels, it is a regression target: bin it first"):
        read_file(path, kind="classes")
    assert read_file(write(tmp_path, y=np.arange(30) % 3, kind=np.array("regression"))).target.is_regression
    assert read_file(write(tmp_path, y=np.arange(60.0).reshape(30, 2))).target.size == 2
    with pytest.raises(ValueError, match="one class label per row"):
        read_file(write(tmp_path, y=np.zeros((30, 2)), kind=np.array("classes")))


def test_rows_without_a_label_are_kept_and_marked(tmp_path, caplog):
    y = (np.arange(30) % 3).astype(float)
    y[[3, 4]] = np.nan
    data = read_file(write(tmp_path, y=y))
    assert data.labelled.tolist() == np.isfinite(y).tolist() and "2 rows have no label" in caplog.text


def test_strings_are_class_labels(tmp_path):
    data = read_file(write(tmp_path, y=np.array(["yes", "no", "maybe"] * 10)))
    assert data.target.names == ("maybe", "no", "yes") and data.labels[:3].tolist() == [2, 1, 0]


def test_sequences_of_length_zero_and_rows_of_zeros(tmp_path):
    lengths = np.r_[0, 2, np.ones(28, int)]
    data = read_file(write(tmp_path, pose=np.ones((30, 3)), off_pose=np.r_[0, lengths.cumsum()]))
    assert data["pose"].has().tolist() == [False] + [True] * 29
    arrays = npz.read(write(tmp_path, text=np.eye(30)[:, :4]))
    assert "text: 26 rows are all zero" in arrays.notes


def test_padded_sequences_are_cut_to_their_lengths_whatever_the_padding_holds(tmp_path):
    lengths = np.arange(30) % 4
    padded = np.full((30, 5, 2), np.nan)
    for i, length in enumerate(lengths):
        padded[i, :length] = i
    part = npz.read(write(tmp_path, text=padded, len_text=lengths)).modalities["text"]
    np.testing.assert_array_equal(part.lengths(), lengths)
    np.testing.assert_array_equal(part.values, np.repeat(np.arange(30), lengths)[:, None].repeat(2, 1))
    padded[9, 0] = np.nan
    with pytest.raises(ValueError, match=r"'text' holds 2 values that are not finite .* the first in row 9"):
        npz.read(write(tmp_path, text=padded, len_text=lengths))


SHAPES = {
    "vectors": {"text": np.ones((30, 4))},
    "sequences": {"text": np.ones((30, 3, 4))},
    "padded": {"text": np.ones((30, 3, 4)), "len_text": np.full(30, 2)},
    "ragged": {"text": np.ones((60, 4)), "off_text": np.arange(0, 61, 2)},
    "tokens": {"text": np.ones(60, int), "off_text": np.arange(0, 61, 2)},
    "pictures": {"text": np.ones((30, 4, 6)), "shape_text": np.array([4, 6])},
    "films": {"text": np.ones((60, 4, 6)), "off_text": np.arange(0, 61, 2)},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_marked_as_missing_are_missing(kind, tmp_path):
    present = np.arange(30) % 5 != 2
    data = read_file(write(tmp_path, **SHAPES[kind], present_text=present))
    assert data["text"].has().tolist() == present.tolist()


def test_a_missing_vector_may_hold_anything(tmp_path):
    text, present = np.ones((30, 4)), np.arange(30) != 7
    text[7] = np.nan
    arrays = npz.read(write(tmp_path, text=text, present_text=present))
    assert np.isfinite(arrays.modalities["text"].values).all() and arrays.notes == []


def test_an_array_of_lengths_under_another_name_is_not_lost_without_a_word(tmp_path):
    (note,) = npz.read(write(tmp_path, lengths=np.arange(30))).notes
    assert note.endswith("lengths is [30]; lengths of padded sequences are read from len_NAME)")


def test_texts_under_another_name_are_not_lost_without_a_word(tmp_path):
    (note,) = npz.read(write(tmp_path, said=np.array(["some words"] * 30))).notes
    assert note == "not used: said (texts are read from text_NAME)"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_pictures_are_scaled_by_their_type(tmp_path, dtype):
    values = np.arange(30 * 24).reshape(30, 4, 6).astype(dtype) % 250
    part = npz.read(write(tmp_path, text=values, shape_text=np.array([4, 6]))).modalities["text"]
    unit = 65535 if dtype is np.uint16 else 255
    np.testing.assert_allclose(part.values, values.reshape(30, 24) / unit, rtol=1e-6)
    assert part.shape == (4, 6)


def test_16_bit_pictures_with_rows_last_are_turned_round():
    values = np.arange(4 * 6 * 9, dtype=">u2").reshape(4, 6, 9)
    notes = []
    part = repairs.pictures(values, "x.mat", "depth", notes, rows=9)
    np.testing.assert_allclose(part.values[2], values[:, :, 2].reshape(-1) / 65535, rtol=1e-6)
    assert part.shape == (4, 6) and notes == ["depth: rows came last, (4, 6, 9), and were moved to the front"]
    with pytest.raises(ValueError, match=r"pictures 'depth' must be \[5, height, width\]"):
        repairs.pictures(values, "x.mat", "depth", [], rows=5)


def test_every_modality_of_a_file_is_used(tmp_path):
    data = read_file(write(tmp_path, third=np.ones((30, 2)), notes_of_mine=np.arange(5)))
    assert data.names == ("pose", "text", "third")
    (note,) = npz.read(tmp_path / "data.npz").notes
    assert note == "not used: notes_of_mine (a modality is [N, D] or [N, T, D]; notes_of_mine is [5])"


def header(text):
    body = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


HEADERS = {
    "more than the file": "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999,), }",
    "negative": "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -2), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (2,), }",
    "no width": "{'descr': '<U0', 'fortran_order': False, 'shape': (99999999999,), }",
    "record": "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (2,), }",
    "code": "__import__('os').system('true')",
    "nested": "(" * 100,
}


@pytest.mark.parametrize("case", HEADERS)
def test_npy_headers_that_lie_are_refused_before_memory_is_taken(tmp_path, case):
    path = tmp_path / "x.npy"
    path.write_bytes(header(HEADERS[case]) + b"\0" * 16)
    with pytest.raises(ValueError) as error:
        npy.read_npy(path)
    assert one_sentence(error, path)


def test_bombs_are_refused_by_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "FREE_BYTES", 1 << 16)
    bomb = bytes(4 << 20)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        text = "{'descr': '|u1', 'fortran_order': False, 'shape': (4194304,), }"
        archive.writestr("y.npy", header(text) + bomb)
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        npy.read_npz(tmp_path / "x.npz")
    (tmp_path / "x-idx1").write_bytes(gzip.compress(writers.idx_bytes(np.frombuffer(bomb, np.uint8))))
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        idx.read_array(tmp_path / "x-idx1")
    scipy.io.savemat(tmp_path / "x.mat", {"X": np.frombuffer(bomb, np.uint8)}, do_compression=True)
    with pytest.raises(ValueError, match="unpacks to more than 200 times its size"):
        matlab.read_variables(tmp_path / "x.mat")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("data", (1 << 40,), "f8", chunks=(1024,))
    with pytest.raises(ValueError, match="'data' claims"):
        hdf5.read_files([tmp_path / "x.h5"])


def test_an_idx_file_must_have_the_bytes_of_its_shape(tmp_path):
    path = tmp_path / "x-idx1"
    path.write_bytes(b"\0\0\x0e\x02\xff\xff\xff\xff\xff\xff\xff\xff" + b"\0" * 8)
    with pytest.raises(ValueError, match=r"must have .* bytes for its shape"):
        idx.read_array(path)


def test_hdf5_files_cannot_point_elsewhere(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"0" * 80)
    cases = {
        "link.h5": lambda file: file.__setitem__("data", h5py.ExternalLink("other.h5", "/data")),
        "soft.h5": lambda file: file.__setitem__("data", h5py.SoftLink("/data")),
        "raw.h5": lambda file: file.create_dataset("data", (10,), "f8", external=[(str(secret), 0, 80)]),
    }
    for name, fill in cases.items():
        with h5py.File(tmp_path / name, "w") as file:
            fill(file)
        with pytest.raises(ValueError, match=r"'data' (is a link to elsewhere|lies in another file)"):
            hdf5.read_files([tmp_path / name])


def test_a_crash_a_hang_and_a_dead_end_of_the_hdf5_library_are_one_sentence(tmp_path, monkeypatch):
    path = writers.csd(tmp_path)
    child = tmp_path / "child.py"
    monkeypatch.setattr(hdf5, "SCRIPT", child)
    monkeypatch.setattr(hdf5, "SECONDS", 1)
    for code, message in (
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "the HDF5 library failed on it"),
        ("import time; time.sleep(60)", "the HDF5 library did not finish in"),
        ("print('nonsense')", "the HDF5 library failed on it"),
    ):
        child.write_text(code)
        with pytest.raises(ValueError, match=message) as error:
            hdf5.read_files([path])
        assert one_sentence(error, path)


def test_mat_files_with_cells_structures_or_of_version_7_3_are_named(tmp_path):
    path = tmp_path / "x.mat"
    scipy.io.savemat(path, {"C": np.array([{}, 1], dtype=object)})
    with pytest.raises(ValueError, match="variable 'C' must be numeric, it is a cell"):
        matlab.read(path)
    scipy.io.savemat(path, {"Z": np.ones(3) * 1j})
    with pytest.raises(ValueError, match="variable 'Z' must be numeric, it is complex"):
        matlab.read(path)
    scipy.io.savemat(path, {"S": {"a": 1}, "T": "text"})
    with pytest.raises(ValueError, match="variable 'S' must be numeric, it is a structure"):
        matlab.read(path)
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(128) + hdf5.SIGNATURE)
    with pytest.raises(ValueError, match="save it in MATLAB with the option -v7"):
        matlab.read(path)


def test_a_mat_file_whose_shape_is_no_whole_number_is_damaged(tmp_path):
    path = writers.matlab(tmp_path, compressed=False)
    content = bytearray(path.read_bytes())
    shape = content.index(struct.pack("<IIII", 5, 8, 10, 4))
    for kind, dims in (
        (7, struct.pack("<ff", np.nan, 4)),
        (7, struct.pack("<ff", np.inf, 4)),
        (5, struct.pack("<ii", -10, 4)),
    ):
        content[shape : shape + 16] = struct.pack("<II", kind, 8) + dims
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a complete MATLAB file") as error:
            matlab.read(path)
        assert one_sentence(error, path)


def test_wav_files_need_a_sane_header_and_one_rate(tmp_path):
    path, whole = tmp_path / "x.wav", (writers.wav(tmp_path) / "no" / "0.wav").read_bytes()
    wavfile.write(path, 7, np.zeros(20, np.int16))
    with pytest.raises(ValueError, match="sampling rate between 1000 and 400000 Hz, it has 7"):
        wav.read(path)
    wavfile.write(path, 16000, np.zeros(2000, np.int16))
    with pytest.raises(ValueError, match="one sampling rate, it has 8000, 16000 Hz"):
        wav.read(tmp_path)
    path.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="is not a complete wav file"):
        wav.read(path)
    wavfile.write(path, 8000, np.zeros(50, np.int16))
    with pytest.raises(ValueError, match="'audio' is missing in every row"):
        wav.read(path)


CSV = {
    "a cell that is no number": ("x_0,label\n1,a\nbad,b\n2,a\n", r"column 'x_0' has no number in row 2: 'bad'"),
    "an empty cell": ("x_0,label\n1,a\n,b\n2,a\n", r"column 'x_0' has no number in row 2"),
    "NaN": ("x_0,label\n1,a\nnan,b\n", r"'x' holds 1 values that are not finite \(NaN\), the first in row 1"),
    "a short row": ("x_0,label\n1,a\n2\n", "row 3 has 1 cells, the first row has 2"),
    "a header alone": ("x_0,label\n", "has a header and no rows"),
    "a column twice": ("x,x\n1,2\n", "several columns x"),
    "an open quote": ('x_0,label\n1,"a\n', "is not a CSV table"),
    "a split": ("x_0,split\n1,train\n2,holdout\n", "'split' must hold train, valid, test or 0, 1, 2; got holdout"),
}


@pytest.mark.parametrize("case", CSV)
def test_what_is_wrong_in_a_table_is_named_with_its_row(tmp_path, case):
    text, message = CSV[case]
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        formats.read(path)
    assert one_sentence(error, path)
    path.write_bytes(b"x,y\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        formats.read(path)


@pytest.mark.parametrize("cell", ["__import__('os').getcwd()", "['a'", "(" * 5000, "{'a': 1}", "[1]"])
def test_irfl_lists_are_read_not_run(tmp_path, cell):
    path = WRITERS["irfl"](tmp_path)
    quoted = cell.replace('"', '""')
    lines = path.read_text().splitlines()
    lines[3] = f'"{quoted}",' + lines[3].split('",', 1)[1]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="'distractors' must hold a list of addresses in row 3"):
        formats.read(path)


JSON = {
    "key": (lambda item: item.pop("sarcasm"), "utterance '1_2' has no 'sarcasm'; it has utterance, speaker"),
    "flag": (lambda item: item.update(sarcasm="maybe"), "'sarcasm' must be true or false, got maybe"),
    "flag of another type": (lambda item: item.update(sarcasm=[1]), "'sarcasm' must be true or false"),
    "text": (lambda item: item.update(utterance=5), "'utterance' must be a string, got 5"),
    "context": (lambda item: item.update(context="It rains."), "'context' must be a list of strings"),
}


@pytest.mark.parametrize("case", JSON)
def test_what_mustard_lacks_is_named_with_its_utterance(tmp_path, case):
    change, message = JSON[case]
    path = WRITERS["mustard"](tmp_path)
    content = json.loads(path.read_text())
    change(content["1_2"])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        mustard_json.read(path)
    assert one_sentence(error, path)


def test_deep_json_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not complete JSON"):
        mustard_json.read(path)


def test_reading_warns_of_nothing_and_leaves_settings_alone(tmp_path):
    import csv

    limit, recursion = csv.field_size_limit(), sys.getrecursionlimit()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("csv", "irfl", "mustard", "npz", "affect"):
            folder = tmp_path / name
            folder.mkdir()
            formats.read(WRITERS[name](folder))
    assert csv.field_size_limit() == limit and sys.getrecursionlimit() == recursion
