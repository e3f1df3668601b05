"""Sound files (``.wav``) as sequences of log-mel spectra: one file a row, or a folder of them.

log(mel power + 1e-10) of frames of 25 ms every 10 ms, Hamming window, triangular filters equally spaced on the mel
scale 2595 log10(1 + f / 700) from 50 Hz to half the sampling rate, samples scaled to [-1, 1], channels averaged. In a
folder with one subfolder a class, the subfolder's name is the label.
"""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np

from models.data.formats.arrays import Arrays, Part, offsets_of
from models.data.formats.checks import read_bytes
from models.data.formats.repairs import note_missing

NAME = "wav"
MELS, LOWEST_HZ, WINDOW_SECONDS, HOP_SECONDS, FLOOR = 40, 50.0, 0.025, 0.010, 1e-10
RATES = (1000, 400_000)


def fits(path: Path) -> bool:
    """A folder with ``.wav`` files in it or one level below, or one such file."""
    return path.suffix.lower() == ".wav" if not path.is_dir() else any(_files(path))


def _files(path: Path) -> list[Path]:
    return sorted([*path.glob("*.wav"), *path.glob("*/*.wav")])


def read_samples(path: str | Path) -> tuple[int, np.ndarray]:
    """Sampling rate and mono samples float64 [n] in [-1, 1].

    Raises FileNotFoundError, or ValueError naming the file.
    """
    from scipy.io import wavfile

    data = read_bytes(path)
    broken = (ValueError, TypeError, IndexError, KeyError, OverflowError, MemoryError, EOFError, UnboundLocalError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # A chunk that is no sound (a title, say) is skipped with a warning.
            warnings.filterwarnings("ignore", message="Chunk .non-data. not understood")
            rate, samples = wavfile.read(io.BytesIO(data))
    except (*broken, ZeroDivisionError, AttributeError, struct.error, Warning) as error:
        raise ValueError(f"{path} is not a complete wav file: {str(error)[:160] or type(error).__name__}") from error
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{path} must have a sampling rate between {RATES[0]} and {RATES[1]} Hz, it has {rate}")
    if samples.dtype.kind == "f":
        scaled = samples.astype(np.float64)
        if not np.isfinite(scaled).all():
            raise ValueError(f"{path} holds samples that are not finite")
    elif samples.dtype == np.uint8:
        scaled = (samples.astype(np.float64) - 128) / 128
    else:
        scaled = samples / float(np.iinfo(samples.dtype).max + 1)
    return rate, scaled.mean(1) if scaled.ndim == 2 else scaled


def log_mel(samples: np.ndarray, rate: int, mels: int = MELS) -> np.ndarray:
    """Log-mel spectra float32 [frames, mels]; no frame when there are fewer samples than a window."""
    window, hop = round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)
    if len(samples) < window:
        return np.zeros((0, mels), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    size = 1 << (window - 1).bit_length()
    filters = mel_filters(size, rate, mels)
    spectra = [
        np.abs(np.fft.rfft(block * np.hamming(window), size)) ** 2 @ filters
        for block in (frames[i : i + 4096] for i in range(0, len(frames), 4096))
    ]
    return np.log(np.concatenate(spectra) + FLOOR).astype(np.float32)


def mel_filters(size: int, rate: int, mels: int) -> np.ndarray:
    """Triangular filters [size / 2 + 1, mels] with peaks of 1."""
    mel = np.linspace(2595 * np.log10(1 + LOWEST_HZ / 700), 2595 * np.log10(1 + rate / 2 / 700), mels + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hz = np.fft.rfftfreq(size, 1 / rate)[:, None]
    rising = (hz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hz) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def read(path: str | Path) -> Arrays:
    """Arrays of one file or of a folder. Raises FileNotFoundError, or ValueError naming the file."""
    path = Path(path)
    files = _files(path) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no .wav files")
    found = [read_samples(file) for file in files]
    rates = sorted({rate for rate, _ in found})
    result = Arrays(
        str(path), NAME, ids=tuple(str(file.relative_to(path)) if path.is_dir() else file.name for file in files)
    )
    if len(rates) > 1:
        raise ValueError(f"{path} must hold files of one sampling rate, it has {', '.join(map(str, rates))} Hz")
    spectra = [log_mel(samples, rate) for rate, samples in found]
    result.modalities["audio"] = Part(np.concatenate(spectra), offsets_of([len(item) for item in spectra]))
    note_missing(result.modalities["audio"].lengths() == 0, "audio", result.notes)
    folders = [file.parent.name if file.parent != path else "" for file in files]
    if path.is_dir() and all(folders):
        names, numbers = np.unique(folders, return_inverse=True)
        result.labels["folder"] = numbers.astype(np.int64)
        result.classes["folder"] = tuple(str(name) for name in names)
    return result.check()
