"""Layers of the sequence models, one file per family; all of them honour lengths."""

from models.layers.ef_lstm import EFLSTM
from models.layers.lmf import LMF, LowRankFusion, PooledEncoder
from models.layers.mag import AdaptationGate
from models.layers.mfn import MFN, MemoryFusion, MFNConfig
from models.layers.mult import CrossModal, MulT, MulTConfig
from models.layers.sequence import LSTM, GRUEncoder, LSTMDecoder, LSTMEncoder, TransformerEncoder
from models.layers.transformer import Dropouts, TransformerLayer, TransformerStack
from models.layers.word_shift import WordShift

__all__ = [
    "EFLSTM",
    "LMF",
    "LSTM",
    "MFN",
    "AdaptationGate",
    "CrossModal",
    "Dropouts",
    "GRUEncoder",
    "LSTMDecoder",
    "LSTMEncoder",
    "LowRankFusion",
    "MFNConfig",
    "MemoryFusion",
    "MulT",
    "MulTConfig",
    "PooledEncoder",
    "TransformerEncoder",
    "TransformerLayer",
    "TransformerStack",
    "WordShift",
]
