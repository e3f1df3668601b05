"""A network with a head, trained on class labels or on a regression target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

from torch import Tensor, nn

from models.batch import Batch, Inputs, Target
from models.data.dataset import Dataset
from models.layers.prediction import prediction_loss, target_statistics
from models.layers.sequence import check_choice, check_positive
from models.layers.text import TextConfig
from models.layers.transformer import check_rate
from models.model import Loss, Model, Phase
from models.shares import by_rows


@dataclass(frozen=True)
class SupervisedSettings:
    """Settings of all models with a head.

    loss: of a regression target, "l1" (the field's choice for sentiment) or "mse"; classes have the cross entropy.
    embedding: of tokens without a table, the width of the trained embedding.
    """

    loss: str = "l1"
    embedding: int = 64

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, ("l1", "mse"))
        if self.embedding < 1:
            raise ValueError(f"embedding must be at least 1, got {self.embedding}")


@dataclass(frozen=True)
class UtteranceSettings(SupervisedSettings):
    """Models that read every modality as one vector, see ``models.layers.utterance``.

    stride: averages this many neighbouring frames first. language: of the first tokens, an LSTM or "bert", the encoder
    ``text``.
    """

    stride: int = 1
    language: str = "lstm"
    text: TextConfig = field(default_factory=TextConfig)
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("language", self.language, ("lstm", "bert"))
        check_positive(stride=self.stride)
        check_rate("dropout", self.dropout)

    @property
    def encoder_of_text(self) -> TextConfig | None:
        return self.text if self.language == "bert" else None


class Network(Protocol):
    """Inputs to features [B, F], features to one output per class or dimension [B, K]."""

    features: Callable[..., Tensor]
    head: Callable[[Tensor], Tensor]


class Supervised(Model):
    """A network ``net`` with a head; ``inlet`` prepares its inputs.

    Terms: "cross_entropy" in nats, or "l1" / "mse" of the target in units of its deviation over the training rows. The
    head predicts the standardised target, ``predict`` returns the target itself. The loss ignores rows without a label.
    """

    headline = "head"

    def __init__(self, inlet: nn.Module, net: nn.Module, data: Dataset, loss: str = "l1"):
        super().__init__()
        self.inlet, self.net = inlet, net
        self.target, self.kind = data.target, loss
        centre, scale = target_statistics(data)
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)

    centre: Tensor
    scale: Tensor

    @by_rows
    def features(self, inputs: Mapping[str, Inputs]) -> Tensor:
        return cast(Network, self.net).features(*self.inlet(inputs))

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """ "fused": the input of the head."""
        return {"fused": self.features(batch.inputs)}

    def outputs(self, batch: Batch) -> Tensor:
        return cast(Network, self.net).head(self.features(batch.inputs))

    def parts(self, inputs: Mapping[str, Inputs]) -> tuple[Tensor, list[Tensor]] | None:
        """``features``, and for every modality a vector that depends on no other modality; None if the network has
        none."""
        parts = getattr(self.net, "parts", None)
        return None if parts is None else parts(*self.inlet(inputs))

    def predict(self, batch: Batch) -> Tensor:
        found = self.outputs(batch)
        return found if self.target.is_classes else found * self.scale + self.centre

    def loss(self, batch: Batch) -> Loss:
        return self.loss_of(self.features(batch.inputs), batch)

    def loss_of(self, fused: Tensor, batch: Batch) -> Loss:
        """The loss for ``fused``, the result of ``features`` for the rows of the batch."""
        name, value = self.label_loss(cast(Network, self.net).head(fused), batch)
        return Loss.of({name: value})

    def label_loss(self, outputs: Tensor, batch: Batch) -> tuple[str, Tensor]:
        """The loss of the head's outputs for the batch's rows, and the name of its term."""
        if batch.target is None:
            raise ValueError("the batch has no labels")
        name = "cross_entropy" if self.target.is_classes else self.kind
        return name, prediction_loss(name, outputs, batch.target, self.centre, self.scale)

    def phases(self) -> list[Phase]:
        return [Phase("main", list(self.parameters()), self.loss, usable=Batch.with_labels)]


def outputs_of(target: Target) -> int:
    """Width of a head. Raises ValueError for data without labels."""
    if target.kind == "none":
        raise ValueError("a model with a head needs labels, the data has none")
    return target.size
