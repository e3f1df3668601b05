"""MAG-BERT and MAG-XLNet: text encoders whose words are shifted by the other modalities (Rahman et al., ACL 2020).

In BERT the gate lies between the embeddings and the first layer, in XLNet between the first layer and the second. The
pooled output is the fused representation z:

    z = Pool(BERT(MAG(E(words), x_1 .. x_M))),   y = W Drop(z) + b

Each word is shifted by the mean of the frames in its share of the time. The public code copies the aligned features of
each word to its word pieces, which needs an alignment by word that few data sets have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from models.baselines.supervised import Supervised, SupervisedSettings, outputs_of
from models.batch import Inputs
from models.data.dataset import Dataset
from models.layers.dropout import Dropout
from models.layers.inlet import Inlet
from models.layers.mag import AdaptationGate, beside
from models.layers.sequence import check_positive
from models.layers.text import TextConfig, TextEncoder, no_tokens
from models.layers.transformer import check_rate
from models.layers.xlnet import XLNetEncoder
from models.model import Model, needs_several


@dataclass(frozen=True)
class MAGSettings(SupervisedSettings):
    """text: the encoder of the first tokens. beta: bound of the shift. shift_dropout: in the gate. dropout: before the
    head. stride: averages this many neighbouring frames of the other modalities first."""

    text: TextConfig = field(default_factory=TextConfig)
    beta: float = 1.0
    shift_dropout: float = 0.5
    dropout: float = 0.1
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(stride=self.stride)
        check_rate("shift_dropout", self.shift_dropout)
        check_rate("dropout", self.dropout)
        if not self.beta >= 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")


class _Read(nn.Module):
    """The words as they are, then every other modality as sequences."""

    def __init__(self, text: str, inlet: Inlet):
        super().__init__()
        self.text, self.inlet = text, inlet

    def forward(self, inputs: Mapping[str, Inputs]) -> list[Inputs]:
        return [inputs[self.text], *self.inlet(inputs)]


class _MAG(nn.Module):
    def __init__(self, encoder: TextEncoder, dims: tuple[int, ...], config: MAGSettings, out: int):
        super().__init__()
        self.encoder = encoder
        self.gate = AdaptationGate(encoder.hidden, dims, config.beta, config.shift_dropout)
        self.out = nn.Sequential(Dropout(config.dropout), nn.Linear(encoder.out_dim, out))

    def features(self, words: Inputs, *others: Inputs) -> Tensor:
        return self.encoder(words, lambda embedded: self.gate(embedded, *(beside(embedded, x) for x in others)))

    def head(self, z: Tensor) -> Tensor:
        return self.out(z)


def build_mag_bert(config: MAGSettings, data: Dataset) -> Model:
    """Raises ValueError for data without tokens or of one modality."""
    return _built("mag-bert", TextEncoder, config, data)


def build_mag_xlnet(config: MAGSettings, data: Dataset) -> Model:
    """Raises ValueError for data without tokens or of one modality, and for a checkpoint of another kind."""
    return _built("mag-xlnet", XLNetEncoder, config, data)


def _built(name: str, encoder: type[TextEncoder], config: MAGSettings, data: Dataset) -> Model:
    text = next((modality for modality in data.modalities if modality.is_tokens), None)
    if text is None:
        raise no_tokens(name, data.names, data.name)
    needs_several(name, data.names)
    inlet = Inlet([m for m in data.modalities if m is not text], config.embedding, config.stride)
    net = _MAG(encoder(text, config.text), inlet.dims, config, outputs_of(data.target))
    return Supervised(_Read(text.name, inlet), net, data, config.loss)
