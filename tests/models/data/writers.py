"""Small files written exactly as by their authors' code: one function per format, which returns the path to read."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from scipy.io import wavfile

SPLITS = {"train": 7, "valid": 3, "test": 4}
DIMS = {"vision": 4, "audio": 3, "text": 5}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def padded(lengths: np.ndarray, steps: int, dim: int, side: str, generator: np.random.Generator) -> np.ndarray:
    """Random normal frames [N, steps, dim], padded with zeros on one side."""
    values = generator.normal(size=(len(lengths), steps, dim)) + 0.1
    step = np.arange(steps)
    used = step >= steps - lengths[:, None] if side == "left" else step < lengths[:, None]
    return values * used[..., None]


def affect_content(steps: int = 6) -> dict:
    generator, content = rng(), {}
    for split, rows in SPLITS.items():
        lengths = generator.integers(1, steps + 1, rows)
        part = {name: padded(lengths, steps, dim, "left", generator) for name, dim in DIMS.items()}
        part["audio"][0, -1, 0] = -np.inf  # COVAREP's value for silence
        part["labels"] = generator.uniform(-3, 3, (rows, 1, 1))
        part["id"] = np.array([f"{split}video[{i}]" for i in range(rows)])
        content[split] = part
    return content


def mult_content() -> dict:
    generator, content = rng(), {}
    for split, rows in SPLITS.items():
        part = {
            name: padded(generator.integers(1, steps + 1, rows), steps, DIMS[name], "left", generator).astype("f4")
            for name, steps in (("vision", 8), ("audio", 7), ("text", 5))
        }
        part["labels"] = generator.uniform(-3, 3, (rows, 1, 1))
        part["id"] = np.array([[f"{split}{i}", "0", "1"] for i in range(rows)], "S")
        content[split] = part
    return content


def mmsa_content(aligned: bool = False) -> dict:
    generator, content = rng(), {}
    for split, rows in SPLITS.items():
        steps = {"text": 5, "audio": 5, "vision": 5} if aligned else {"text": 5, "audio": 7, "vision": 8}
        words = generator.integers(2, 6, rows)
        lengths = {name: words if aligned else generator.integers(1, t + 1, rows) for name, t in steps.items()}
        lengths["text"] = words
        part = {n: padded(lengths[n], steps[n], DIMS[n], "right", generator).astype("f4") for n in steps}
        mask = np.arange(5) < words[:, None]
        part["text_bert"] = np.stack([mask * generator.integers(100, 999, (rows, 5)), mask, 0 * mask], 1).astype("f4")
        if not aligned:
            part |= {f"{name}_lengths": lengths[name].tolist() for name in ("audio", "vision")}
        part["raw_text"] = [f"WORDS OF {i}" for i in range(rows)]
        part["id"] = [f"{split}{i // 2}$_${i}" for i in range(rows)]
        part["annotations"] = ["Positive"] * rows
        part["regression_labels"] = generator.uniform(-3, 3, rows).astype("f4")
        part["classification_labels"] = generator.integers(0, 3, rows).astype("f4")
        content[split] = part
    return content


def mimic_content(rows: int = 40) -> dict:
    generator = rng()
    content = {
        "ep_tdata": generator.normal(size=(rows, 24, 12)),
        "adm_features_all": generator.normal(size=(rows, 5)),
        "adm_labels_all": np.eye(7)[generator.integers(0, 7, rows)],
        "y_icd9": generator.integers(0, 2, (rows, 20)),
    }
    content["ep_tdata"][0, 0, 0] = np.nan
    content["adm_features_all"][1, 1] = np.inf
    return content


def pickled(content: object, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def affect(folder: Path) -> Path:
    return pickled(affect_content(), folder / "mosi_data.pkl")


def mult(folder: Path) -> Path:
    return pickled(mult_content(), folder / "mosi_data_noalign.pkl", protocol=2)


def mmsa(folder: Path) -> Path:
    return pickled(mmsa_content(), folder / "unaligned_50.pkl")


def mimic(folder: Path) -> Path:
    return pickled(mimic_content(), folder / "im.pk", protocol=2)


def acl17_content() -> tuple:
    generator, sides = rng(), []
    for videos in (5, 3):
        lengths = generator.integers(1, 5, videos)
        inside = np.arange(4) < lengths[:, None]
        values = padded(lengths, 4, 3, "right", generator)
        sides.append((values, inside * generator.integers(0, 2, (videos, 4)), lengths.tolist()))
    (train, train_labels, train_lengths), (test, test_labels, test_lengths) = sides
    return train, train_labels, test, test_labels, 4, train_lengths, test_lengths


def acl17(folder: Path) -> Path:
    return pickled(acl17_content(), folder / "audio.pickle", protocol=2)


def csd_file(path: Path, root: str, entries: dict[str, tuple[np.ndarray, np.ndarray]]) -> Path:
    """Writes a file as the SDK's write_CSD does: gzip with whole-array chunks, metadata as JSON strings."""
    with h5py.File(path, "w") as file:
        data = file.create_group(f"{root}/data")
        for name, (features, intervals) in entries.items():
            group = data.create_group(name)
            group.create_dataset("features", data=features, compression="gzip", chunks=features.shape)
            group.create_dataset("intervals", data=intervals, compression="gzip", chunks=intervals.shape)
        metadata = file.create_group(f"{root}/metadata")
        for key, value in {"root name": root, "dataset name": "toy", "version": "1"}.items():
            metadata.create_dataset(key, (1,), dtype=h5py.string_dtype())[0] = json.dumps(value).encode()
    return path


def csd_entries(step: float, dim: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    entries = {}
    for video in ("vidA", "vidB", "vidC"):
        start = np.arange(0, 6, step)
        entries[video] = (
            generator.normal(size=(len(start), dim)).astype("f4"),
            np.stack([start, start + step], 1),
        )
    return entries


def csd(folder: Path) -> Path:
    return csd_file(folder / "COVAREP.csd", "COVAREP", csd_entries(0.5, 3, 0))


def csd_folder(folder: Path) -> Path:
    """Two modalities, and two labelled segments per video."""
    csd_file(folder / "words.csd", "words", csd_entries(1.0, 2, 1))
    entries = csd_entries(0.5, 3, 0)
    entries["vidA"][0][0, 0] = -np.inf
    csd_file(folder / "COVAREP.csd", "COVAREP", entries)
    labels = {video: (np.array([[1.5], [-2.0]]), np.array([[0.0, 2.0], [2.0, 5.0]])) for video in entries}
    csd_file(folder / "labels.csd", "Opinion Segment Labels", labels)
    return folder


def mfn(folder: Path) -> Path:
    """New-style names (``d1``), and padding as in the published files: all modalities have the same lengths."""
    generator = rng()
    for split, rows in SPLITS.items():
        lengths = generator.integers(1, 6, rows)
        for name, dim in (("audio", 3), ("video", 4)):
            with h5py.File(folder / f"{name}_{split}.h5", "w") as file:
                file["d1"] = padded(lengths, 5, dim, "left", generator)
        with h5py.File(folder / f"y_{split}.h5", "w") as file:
            file["d1"] = generator.uniform(1, 5, rows)
    return folder


def idx_bytes(values: np.ndarray) -> bytes:
    code = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}[values.dtype.str[1:]]
    head = bytes([0, 0, code, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return head + values.astype(values.dtype.newbyteorder(">")).tobytes()


def idx(folder: Path) -> Path:
    generator = rng()
    for name, rows in (("train", 8), ("t10k", 5)):
        images = idx_bytes(generator.integers(0, 256, (rows, 4, 3)).astype("u1"))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(idx_bytes(generator.integers(0, 3, rows).astype("u1")))
    return folder


def avmnist(folder: Path) -> Path:
    generator = rng()
    for side, rows in (("train", 24), ("test", 6)):
        for name, shape in (("image", (784,)), ("audio", (12, 12))):
            (folder / name).mkdir(exist_ok=True)
            np.save(folder / name / f"{side}_data.npy", generator.integers(0, 256, (rows, *shape)).astype("f4"))
        np.save(folder / f"{side}_labels.npy", np.arange(rows) % 3)
    return folder


def csv(folder: Path) -> Path:
    path = folder / "table.csv"
    rows = ["id,audio_0,audio_1,text_0,text_1,age,label,split,remark"]
    names = ["train", "train", "valid", "test"]
    rows += [f"r{i},{i}.5,{-i},{i / 3:.3f},1e-3,{20 + i},{'ab'[i % 2]},{names[i % 4]},good {i}" for i in range(12)]
    path.write_text("\n".join(rows) + "\n")
    return path


def irfl(folder: Path) -> Path:
    path = folder / "simile_understanding_task.csv"
    line = "\"['https://a/1.jpg', 'https://a/2.jpg', 'https://a/3.jpg']\",\"['https://a/4.jpg']\",\"{}\",{},image,{}"
    rows = ["distractors,answer,images_metadata,figurative_type,type,phrase"]
    rows += [line.format("{}", ("simile", "metaphor")[i % 2], f"as brave as a lion {i // 2}") for i in range(8)]
    path.write_text("\n".join(rows) + "\n")
    return path


def matlab(folder: Path, compressed: bool = True) -> Path:
    path, generator = folder / "data.mat", rng()
    content = {"X": generator.normal(size=(10, 4)), "Z": generator.normal(size=(3, 5, 10)), "y": np.arange(10) % 2}
    scipy.io.savemat(path, content, do_compression=compressed)
    return path


def wav(folder: Path) -> Path:
    for label in ("no", "yes"):
        (folder / label).mkdir(exist_ok=True)
        for i in range(2):
            samples = (3000 * np.sin(np.arange(1600) * (0.1 + 0.2 * i))).astype("i2")
            wavfile.write(folder / label / f"{i}.wav", 8000, samples)
    return folder


def mustard(folder: Path) -> Path:
    path = folder / "sarcasm_data.json"
    content = {
        f"1_{i}": {
            "utterance": f"What a lovely day {i}.",
            "speaker": "ABC"[i % 3],
            "context": ["It rains.", "Again."][: i % 3],
            "context_speakers": ["A", "B"][: i % 3],
            "show": "BBT",
            "sarcasm": bool(i % 2),
        }
        for i in range(9)
    }
    path.write_text(json.dumps(content))
    return path


def npz_content(rows: int = 30) -> dict[str, np.ndarray]:
    generator = rng()
    lengths = generator.integers(2, 6, rows)
    return {
        "pose": generator.normal(size=(lengths.sum(), 3)),
        "off_pose": np.concatenate([[0], lengths.cumsum()]),
        "text": generator.normal(size=(rows, 4)),
        "y": np.arange(rows) % 3,
        "split": np.arange(rows) // 3 % 3,
    }


def npz(folder: Path) -> Path:
    path = folder / "data.npz"
    np.savez(path, **npz_content())
    return path


def declare_lab(folder: Path, lengths: bool = False, width: int = 1) -> Path:
    generator = rng()
    for name, rows in (("train", 7), ("dev", 3), ("test", 4)):
        content = []
        for i in range(rows):
            steps = 2 + i % 3
            words = [f"w{j}" for j in range(steps)]
            parts = [
                generator.integers(0, 9, steps),
                generator.normal(size=(steps, 4)),
                generator.normal(size=(steps, 3)),
            ]
            parts += [words, *([steps, steps - 1] if lengths else [])]
            content.append((tuple(parts), generator.normal(size=(1, width)), f"{name}{i // 2}[{i}]"))
        pickled(content, folder / f"{name}.pkl")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "affect": affect,
    "mult": mult,
    "mmsa": mmsa,
    "mimic": mimic,
    "acl17": acl17,
    "csd": csd,
    "csd folder": csd_folder,
    "mfn": mfn,
    "idx": idx,
    "avmnist": avmnist,
    "declare-lab": declare_lab,
    "csv": csv,
    "irfl": irfl,
    "matlab": matlab,
    "matlab plain": lambda folder: matlab(folder, compressed=False),
    "wav": wav,
    "mustard": mustard,
    "npz": npz,
}
