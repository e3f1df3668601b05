"""The penalty around a base model: L = L_base - lambda I(z), I a dependency measure by a critic trained beside it.

With z = M(x_1 .. x_M) the fused representation of a row, z' that of a row whose modalities come from different rows,

    kl           I = mean T(z) - log mean exp T(z')
    f            I = mean T(z) - mean exp(T(z') - 1)
    wasserstein  I = mean T(z) - mean T(z')            |grad T| near 1 by a penalty in the critic's steps

The base maximises I with the critic T held fixed, then T does with z and z' held fixed, K steps. The gradient reaches
the base through z and through z'. Rows and shuffled rows go through the base as one batch.
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


class Codes(NamedTuple):
    """What the critic sees of rows and of shuffled rows, detached: [n, D] and [m, D]."""

    joint: Tensor
    product: Tensor


class MDM(Model):
    """``base`` with the penalty; predictions and representations are the base's, validation rows see its loss alone.

    Terms: the base's, and "dependency", the measure on the training batch (nats for kl and f). Batches with fewer
    complete rows than modalities, and at least 2, have no penalty. The permutations come from a generator of their own.

    A base is any model whose ``representations`` name a fused vector per row. One that also has ``features(inputs)``
    and ``loss_of(features, batch)``, as every network with a head has, goes through one forward pass of n + m rows;
    others pay one more, of n + m rows. ``input: triple`` takes ``parts(inputs)``, the fused representation and one
    vector per modality that no other has touched. Of a base without them the parts are its representation of one
    modality at a time, all others missing: one more pass of n + m rows a modality.
    """

    def __init__(self, base: Model, data: Dataset, config: Settings):
        super().__init__()
        if isinstance(base, MDM):
            raise ValueError("base must be a model without the penalty, got mdm")
        needs_several("mdm", data.names)
        self.base, self.config, self.modalities = base, config, len(data.names)
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
        """The statistics network T: rows of what it reads to scores."""
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
        """lambda at this point of the training."""
        ramp = self.config.ramp
        return self.config.weight * (min(1.0, self.progress / ramp) if ramp else 1.0)

    def loss(self, first: Phase, batch: Batch) -> Loss:
        """The base's loss with the penalty; the base's alone in validation, at weight 0 and for too few rows."""
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
        """Rows that a shuffle needs, with two shuffled rows at least."""
        return max(2, self.modalities)

    def _penalised(self, task: Tensor, gain: Tensor, z: Tensor) -> Tensor:
        """task - gain, whose gradient in the base is that of the task and the gain's, cut to the same length."""
        if self.config.balance == "none" or not gain.requires_grad:
            return task - gain
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        if self.config.balance == "fused":
            wanted, extra = (average(torch.autograd.grad(t, [z], **options)) for t in (task, gain))
            if not bool(wanted[0].any()):
                return task - gain  # a base whose loss does not go through z has nothing to compare with
        if self.config.balance == "parameters" or not bool(extra[0].any()):
            # Parts of a triple may have left the base before z: then z knows nothing of the gain.
            places = [p for p in self.base.parameters() if p.requires_grad]
            wanted, extra = (average(torch.autograd.grad(t, places, **options)) for t in (task, gain))
        length, longest = (torch.stack([g.norm() for g in gradients]).norm() for gradients in (extra, wanted))
        return task - gain * (longest / length.clamp(min=1e-30)).clamp(max=1).detach()

    @torch.no_grad()
    def fixed(self, batch: Batch) -> Codes | None:
        """Codes of the batch: those of the main step where it met the same rows."""
        if self.codes is not None and torch.equal(self.codes[0], batch.rows):
            return self.codes[1]
        if batch.size < self.least:
            return None
        with kept_stream():
            seen = self.read(self._shuffled(batch))
        return Codes(seen[: batch.size], seen[batch.size :])

    def critic_loss(self, codes: Codes) -> Loss:
        """What the critic minimises: the negative measure, and for the Wasserstein distance the gradient penalty."""
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
        """What the critic reads of the batch's rows, [n, D]."""
        return self._bounded(torch.cat(self._read(batch)[1], 1))

    def scores(self, seen: Tensor) -> Tensor:
        """T of what ``read`` gives, [n]."""
        return self._clamped(self.critic(seen))

    def _measured(self, joint: Tensor, product: Tensor) -> Tensor:
        t, s = self.scores(torch.cat([joint, product])).split([len(joint), len(product)])
        return self.measure.estimate(t, s)

    def _clamped(self, scores: Tensor) -> Tensor:
        limit = self.config.clamp
        return scores if self.config.measure == "wasserstein" or not limit else scores.clamp(-limit, limit)

    def _bounded(self, x: Tensor) -> Tensor:
        """What the critic reads, parts side by side, each through a LayerNorm where the settings say so."""
        bound = self.config.bound
        if bound == "norm" or (bound == "auto" and self.config.measure == "wasserstein"):
            return torch.cat([F.layer_norm(part, part.shape[1:]) for part in x.split(self.widths, 1)], 1)
        return x

    def _read(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The fused representation, and the parts that the critic reads."""
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

    def _shuffled(self, batch: Batch) -> Batch:
        """The batch and its shuffled rows."""
        indices = self.measure.draws.product_indices(batch.size, len(batch.inputs))
        lengths = self.config.lengths
        if self.config.control == "same":
            # Whole rows move, so their lengths do too: the shuffled rows are the batch's own.
            indices, lengths = [indices[-1]] * len(indices), "moved"
        number = max(2, round(self.config.negatives * batch.size))
        return with_shuffled(batch, [index[:number] for index in indices], lengths)


def only(batch: Batch, name: str) -> Batch:
    """The batch with all modalities but one missing."""
    gone = torch.ones(batch.size, dtype=torch.bool, device=batch.rows.device)
    return batch._replace(inputs={n: x if n == name else without(x, gone) for n, x in batch.inputs.items()})


@contextmanager
def kept_stream() -> Iterator[None]:
    """Numbers drawn inside are drawn again outside: an extra pass leaves the rest of a step as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def build(config: Settings, data: Dataset, base: Model) -> MDM:
    return MDM(base, data, config)
