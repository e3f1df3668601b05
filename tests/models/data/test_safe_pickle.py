"""Pickles are read without executing the calls that they contain."""

import collections
import datetime
import io
import os
import pickle
import pickletools
import random
import time

import numpy as np
import pytest
import torch

from models.data import safe_pickle

PLAIN = {
    "numbers": [1, -2.5, True, None, 2**70, 1j],
    "texts": ("a", "ä", b"bytes", bytearray(b"more")),
    "containers": {"set": {1, 2}, "frozen": frozenset("xy"), ("a", 1): [], "empty": ()},
    "ordered": collections.OrderedDict(a=1),
    "counted": collections.defaultdict(list, {"z": [1]}),
}
ARRAYS = {
    "floats": np.arange(6.0).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "other byte order": np.arange(4, dtype=">i4"),
    "strings": np.array(["ab", "c"]),
    "byte strings": np.array([b"ab", b"c"]),
    "booleans": np.array([True, False]),
    "half": np.ones(3, np.float16),
    "nothing": np.zeros((0, 3)),
    "one number": np.array(3.0),
}


def save(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_back_from_every_protocol(tmp_path, protocol):
    objects = np.array([np.zeros(2), "text", None, [1]], dtype=object)
    read = safe_pickle.load(
        save(tmp_path / "x.pkl", {**PLAIN, **ARRAYS, "objects": objects, "scalar": np.float32(3)}, protocol)
    )
    for key, value in PLAIN.items():
        assert read[key] == value, key
    for key, value in ARRAYS.items():
        assert read[key].dtype == value.dtype.newbyteorder("="), key
        np.testing.assert_array_equal(read[key], value)
    assert read["objects"].shape == (4,) and (read["objects"][0] == 0).all() and read["objects"][3] == [1]
    assert read["scalar"] == 3


def test_what_occurs_twice_is_shared(tmp_path):
    array = np.ones(3)
    read = safe_pickle.load(save(tmp_path / "x.pkl", [array, array, [array]]))
    assert read[0] is read[1] is read[2][0]


def test_a_python_2_pickle_reads_as_pickle_reads_it(data_dir):
    path = data_dir / "original" / "mosi_acl17" / "audio.pickle"
    read = safe_pickle.load(path)
    expected = pickle.loads(path.read_bytes(), encoding="latin1")
    assert len(read) == len(expected) == 7
    for ours, theirs in zip(read, expected, strict=True):
        assert type(ours) is type(theirs)
        np.testing.assert_array_equal(ours, theirs)


def test_python_2_text_is_decoded(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02}(U\x01aU\x02\xc3\xa4U\x01bU\x01\xe4u.")
    assert safe_pickle.load(path) == {"a": "ä", "b": "ä"}


class Attack:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


REFUSED = {
    "system": (lambda path: Attack(os.system, f"touch {path}"), r"asks for posix.system"),
    "eval": (lambda path: Attack(eval, f"open({str(path)!r}, 'w')"), r"asks for builtins.eval"),
    "getattr": (lambda path: [Attack(getattr, "text", "upper")], r"asks for builtins.getattr"),
    "tensor": (lambda path: torch.zeros(2), r"asks for torch"),
    "date": (lambda path: datetime.date(2020, 1, 1), r"asks for datetime.date"),
    "class": (lambda path: io.StringIO(), r"asks for _io.StringIO"),
    "structured": (lambda path: np.zeros(2, [("a", "f4")]), r"dtype 'V4'"),
    "dates": (lambda path: np.zeros(2, "M8[s]"), r"dtype 'M8'"),
    "masked": (lambda path: np.ma.masked_array([1.0]), r"asks for numpy"),
    "deep": (lambda path: nested(200), "nest deeper"),
}


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("case", REFUSED)
def test_everything_else_is_refused_by_its_name_and_nothing_runs(tmp_path, case):
    make, message = REFUSED[case]
    marker = tmp_path / "ran"
    path = save(tmp_path / "x.pkl", make(marker))
    with pytest.raises(ValueError, match=message) as caught:
        safe_pickle.load(path)
    assert str(caught.value).startswith(str(path)) and not marker.exists()


STREAMS = {
    # Setting the state of a function, or an attribute of a class, would change code.
    "state of a function": (b"c_codecs\nencode\n}S'x'\nK\x01sb.", "sets the state of"),
    "persistent object": (b"\x80\x04\x8c\x01aQ.", "BINPERSID"),
    "extension": (b"\x80\x02\x82\x01.", "EXT1"),
    "instance": (b"(ios\nsystem\n.", "INST"),
    "new object": (b"\x80\x02cbuiltins\nset\n)\x81.", "NEWOBJ"),
    "bytes of any length": (b"\x80\x04cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.", "malformed"),
    "string longer than the file": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f.", "not a complete pickle"),
    "itself": (b"\x80\x02]q\x00h\x00a.", "hold themselves"),
    "no mark": (b"\x80\x02u.", "not a complete pickle"),
    "empty stack": (b".", "not a complete pickle"),
    "two objects": (b"N.N.", "more after its first object"),
    "a type as data": (b"cnumpy\nndarray\n.", "a type stands where data should be"),
    "array of another class": (
        b"cnumpy.core.multiarray\n_reconstruct\n(cbuiltins\nset\n(K\x00tS'b'\ntR.",
        "asks for an array of type builtins.set",
    ),
    "items for a number": (b"K\x01]a.", "no list"),
    "dictionary key": (b"}]K\x01s.", "as a dictionary key"),
}


@pytest.mark.parametrize("case", STREAMS)
def test_hostile_streams_are_refused(tmp_path, case):
    stream, message = STREAMS[case]
    path = tmp_path / "x.pkl"
    path.write_bytes(stream)
    with pytest.raises(ValueError, match=message):
        safe_pickle.load(path)


def test_a_huge_memo_index_costs_nothing(tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x02Nr\xff\xff\xff\x7fj\xff\xff\xff\x7f\x86.")
    assert safe_pickle.load(path) == (None, None)


@pytest.mark.parametrize("use", [b"", b"}(h\x00K\x01u", b"\x8f(h\x00\x90"], ids=["value", "key", "member"])
def test_tuples_of_tuples_cannot_take_exponential_time(tmp_path, use):
    """t = (t, t), nested 60 times: hashing it, or walking it without remembering visited nodes, visits 2^60 nodes."""
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04)" + b"2\x86" * 60 + b"q\x00" + use + b".")
    start = time.process_time()
    try:
        safe_pickle.load(path)
    except ValueError:
        assert use
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "shape",
    [(2**40,), (2**39, 2**39), (-1,), (2.0,), "ab", (2,) * 40],
    ids=["huge", "product", "negative", "float", "text", "axes"],
)
def test_a_shape_must_fit_the_bytes(tmp_path, shape):
    class Claims:
        def __reduce__(self):
            array = np.zeros(2)
            function, args, _ = array.__reduce__()
            return function, args, (1, shape, np.dtype("f8"), False, b"\0" * 16)

    with pytest.raises(ValueError, match="array"):
        safe_pickle.load(save(tmp_path / "x.pkl", Claims()))


def test_every_truncation_is_explained(tmp_path):
    path = save(tmp_path / "x.pkl", {"a": np.arange(5.0), "b": ["x", {"c": (1, 2)}]}, protocol=2)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.pkl"):
            safe_pickle.load(path)


def test_random_opcodes_end_as_a_value_or_one_sentence(tmp_path):
    chooser = random.Random(0)
    codes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    path = tmp_path / "x.pkl"
    for _ in range(2000):
        body = b"".join(
            chooser.choice(codes) + bytes(chooser.randrange(4) for _ in range(chooser.randrange(3)))
            for _ in range(chooser.randrange(1, 25))
        )
        path.write_bytes(body + b".")
        try:
            safe_pickle.load(path)
        except ValueError as error:
            assert "\n" not in str(error)
