"""The penalty around a base model: L = L_base - lambda I(z), I a dependency measure by a critic trained beside it.

Let z = M(x_1 .. x_M) be the fused representation of a row, and z' that of a shuffled row, whose modalities come from
different rows:

    kl           I = mean T(z) - log mean exp T(z')
    f            I = mean T(z) - mean exp(T(z') - 1)
    wasserstein  I = mean T(z) - mean T(z')            |grad T| near 1 by a penalty in the critic's steps

The base maximises I with a fixed critic T; then T maximises I with fixed z and z' for K steps. The gradient reaches the
base through z and through z'. Rows and shuffled rows pass through the base in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_kernels.bounds.base import gradient_norm, interpolate
from mi_kernels.bounds.total_correlation import JointCritic, TotalCorrelation
from models.batch import Batch
from models.data.corruption import without
from models.data.dataset import Dataset
from models.mdm.config import Settings
from models.mdm.shuffle import with_shuffled
from models.model import Loss, Model, OptimizerConfig, Phase, needs_several
from models.shares import average

# At B = 32 four shuffled rows are an eighth, whose cost is within a quarter of MFN's step; eight are beyond it.
FEWEST = 4


class Codes(NamedTuple):
    """The detached critic inputs of rows [n, D] and of shuffled rows [m, D]."""

    joint: Tensor
    product: Tensor


class MDM(Model):
    """``base`` with the penalty. Predictions, representations and the validation loss are those of the base.

    Terms: those of the base, and "dependency", the measure on the training batch (nats for kl and f). There is no
    penalty for batches with fewer than two complete rows or fewer complete rows than modalities. The permutations come
    from a private generator.

    A base is any model with a fused vector per row among its ``representations``. If it also has ``features(inputs)``
    and ``loss_of(features, batch)``, as all networks with a head do, there is one forward pass of n + m rows; otherwise
    one more pass of n + m rows is needed. ``input: triple`` uses ``parts(inputs)``, the fused representation and one
    vector per modality that depends on no other modality. For a base without ``parts``, the vector of a modality is the
    base's representation with all other modalities missing, which takes one more pass of n + m rows per modality.
    """

    def __init__(self, base: Model, data: Dataset, config: Settings):
        super().__init__()
        if isinstance(base, MDM):
            raise ValueError("base must be a model without the penalty, got mdm")
        needs_several("mdm", data.names)
        self.base, self.config, self.modalities = base, config, len(data.names)
        # One modality of a shuffled row may stay: the text, whose first and last tokens mean something to its encoder.
        tokens = [modality.is_tokens for modality in data.modalities]
        self.stays = tokens.index(True) if any(tokens) else 0
        self.headline, self.views, self.shown = base.headline, base.views, base.shown
        self.whole = hasattr(base, "loss_of") and hasattr(base, "features") and config.representation == "fused"
        self.widths = self._widths(data)
        critic = JointCritic(sum(self.widths), config.hidden)
        with torch.no_grad():
            cast(torch.nn.Linear, critic.mlp.layers[-1]).weight.mul_(0.1)
        self.measure = TotalCorrelation(critic, config.measure, penalty=config.penalty)
        self.codes: tuple[Tensor, Codes] | None = None

    @torch.no_grad()
    def _widths(self, data: Dataset) -> list[int]:
        training = self.base.training
        self.base.eval()
        try:
            return [part.shape[1] for part in self._read(data.batch(data.rows("train")[:2]))[1]]
        finally:
            self.base.train(training)

    @property
    def critic(self) -> torch.nn.Module:
        """The statistics network T, which maps rows to scores."""
        return self.measure.critic

    def phases(self) -> list[Phase]:
        first, *others = self.base.phases()
        main = first._replace(loss=lambda batch: self.loss(first, batch))
        if first.fixed is not None:
            raise ValueError("mdm cannot wrap a model whose first phase holds features fixed")
        if self.config.control == "random":
            return [main, *others]
        critic = Phase(
            "critic",
            list(self.critic.parameters()),
            self.critic_loss,
            self.config.critic_steps,
            OptimizerConfig(self.config.critic_lr, 0.0),
            self.fixed,
            self.config.fresh,
            Batch.complete,
        )
        return [main, *others, critic]

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        return self.base.representations(batch)

    def predict(self, batch: Batch) -> Tensor | None:
        return self.base.predict(batch)

    def weight(self) -> float:
        """The current value of lambda."""
        ramp = self.config.ramp
        return self.config.weight * (min(1.0, self.progress / ramp) if ramp else 1.0)

    def loss(self, first: Phase, batch: Batch) -> Loss:
        """The loss of the base with the penalty; without the penalty in validation, for weight 0 and for too few
        rows."""
        self.base.progress, self.codes = self.progress, None
        weight, complete = self.weight(), batch.complete()
        if not self.training or weight == 0 or complete.size < self.least:
            return first.loss(batch)
        both = self._shuffled(complete)
        if self.whole and complete is batch:
            z, parts = self._read(both)
            found = self.base.loss_of(z[: batch.size], batch)  # type: ignore[operator]
        else:
            found = first.loss(batch)
            with kept_stream():
                z, parts = self._read(both)
        seen = self._bounded(torch.cat(parts, 1))
        codes = Codes(seen[: complete.size], seen[complete.size :])
        value = self._measured(*codes)
        self.codes = complete.rows, Codes(*(t.detach() for t in codes))
        total = self._penalised(found.total, weight * value, z)
        return Loss(total, found.terms | {"dependency": value.detach()})

    @property
    def least(self) -> int:
        """The number of rows that a shuffle needs."""
        return max(2, self.modalities)

    def _penalised(self, task: Tensor, gain: Tensor, z: Tensor) -> Tensor:
        """task - gain, where the norm of the gain's gradient in the base is limited to that of the task's gradient."""
        if self.config.balance == "none" or not gain.requires_grad:
            return task - gain
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        if self.config.balance == "fused":
            wanted, extra = (average(torch.autograd.grad(t, [z], **options)) for t in (task, gain))
            if not bool(wanted[0].any()):
                return task - gain  # the loss of the base does not depend on z, so there is no gradient to compare with
        if self.config.balance == "parameters" or not bool(extra[0].any()):
            # The vectors of a triple may not depend on z; then the gain has no gradient in z.
            places = [p for p in self.base.parameters() if p.requires_grad]
            wanted, extra = (average(torch.autograd.grad(t, places, **options)) for t in (task, gain))
        length, longest = (torch.stack([g.norm() for g in gradients]).norm() for gradients in (extra, wanted))
        return task - gain * (longest / length.clamp(min=1e-30)).clamp(max=1).detach()

    @torch.no_grad()
    def fixed(self, batch: Batch) -> Codes | None:
        """Critic inputs of the batch: those of the main step if it used the same rows."""
        if self.codes is not None and torch.equal(self.codes[0], batch.rows):
            return self.codes[1]
        if batch.size < self.least:
            return None
        with kept_stream():
            seen = self.read(self._shuffled(batch))
        return Codes(seen[: batch.size], seen[batch.size :])

    def critic_loss(self, codes: Codes) -> Loss:
        """The loss of the critic: the negative measure, plus the gradient penalty for the Wasserstein distance."""
        value = self._measured(codes.joint, codes.product)
        if self.config.measure != "wasserstein":
            return Loss(-value, {"dependency": value.detach()})
        number = len(codes.product)
        draws = self.measure.draws
        share = draws.uniform(torch.Size([number]), codes.joint)
        other = draws.permutation(len(codes.joint))[:number].to(codes.joint.device)
        with torch.enable_grad():
            points = interpolate(codes.joint[other], codes.product, share)
            norm = gradient_norm(self.critic(points), [points], True)
        terms = {"dependency": value.detach(), "gradient_norm": norm.detach().mean()}
        return Loss(self.measure.penalised(value, norm), terms)

    def read(self, batch: Batch) -> Tensor:
        """The critic inputs of the rows of the batch, [n, D]."""
        return self._bounded(torch.cat(self._read(batch)[1], 1))

    def scores(self, seen: Tensor) -> Tensor:
        """The scores T(seen), [n], of critic inputs from ``read``."""
        return self._clamped(self.critic(seen))

    def _measured(self, joint: Tensor, product: Tensor) -> Tensor:
        t, s = self.scores(torch.cat([joint, product])).split([len(joint), len(product)])
        return self.measure.estimate(t, s)

    def _clamped(self, scores: Tensor) -> Tensor:
        limit = self.config.clamp
        return scores if self.config.measure == "wasserstein" or not limit else scores.clamp(-limit, limit)

    def _bounded(self, x: Tensor) -> Tensor:
        """Concatenates the critic inputs, each after a LayerNorm if the settings say so."""
        bound = self.config.bound
        if bound == "norm" or (bound == "auto" and self.config.measure == "wasserstein"):
            return torch.cat([F.layer_norm(part, part.shape[1:]) for part in x.split(self.widths, 1)], 1)
        return x

    def _read(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The fused representation, and the critic inputs."""
        if self.config.input == "fused":
            z = self._represented(batch)
            return z, [z]
        parts: Any = getattr(self.base, "parts", None) if self.whole else None
        found = None if parts is None else parts(batch.inputs)
        if found is not None:
            return found
        z = self._represented(batch)
        with kept_stream():
            return z, [self._represented(only(batch, name)) for name in batch.inputs]

    def _represented(self, batch: Batch) -> Tensor:
        name = self.config.representation
        if self.whole:
            return self.base.features(batch.inputs)  # type: ignore[operator]
        found = self.base.representations(batch)
        if name not in found:
            raise ValueError(
                f"the base has no representation {name!r}; set representation to one of {', '.join(found)}"
            )
        return found[name]

    def permutations(self, rows: int) -> list[Tensor]:
        """For each modality, the row [rows] that a shuffled row takes it from; the row itself for the one that
        stays."""
        indices = self.measure.draws.product_indices(rows, self.modalities)
        indices.insert(self.stays, indices.pop(0))  # the first is the identity
        return indices

    def _shuffled(self, batch: Batch) -> Batch:
        """The batch and its shuffled rows."""
        indices, lengths = self.permutations(batch.size), self.config.lengths
        if self.config.control == "same":
            # All modalities of a row move together, and so do their lengths: the shuffled rows are rows of the batch.
            # The permutation is that of a modality that moves: the one before the one that stays, or the last.
            indices, lengths = [indices[self.stays - 1]] * len(indices), "moved"
        number = min(batch.size, max(FEWEST, round(self.config.negatives * batch.size)))
        return with_shuffled(batch, [index[:number] for index in indices], lengths)


def only(batch: Batch, name: str) -> Batch:
    """The batch with all modalities but one missing."""
    gone = torch.ones(batch.size, dtype=torch.bool, device=batch.rows.device)
    return batch._replace(inputs={n: x if n == name else without(x, gone) for n, x in batch.inputs.items()})


@contextmanager
def kept_stream() -> Iterator[None]:
    """Restores the random state on exit, so that an additional pass does not change the rest of a step."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def build(config: Settings, data: Dataset, base: Model) -> MDM:
    return MDM(base, data, config)
