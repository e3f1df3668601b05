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
from models.data.dataset import Dataset
from models.mdm.config import Settings
from models.mdm.shuffle import with_shuffled
from models.model import Loss, Model, OptimizerConfig, Phase
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
    others pay one more, of n + m rows. ``input: triple`` needs ``unimodal(features)``.
    """

    def __init__(self, base: Model, data: Dataset, config: Settings):
        super().__init__()
        if len(data.names) < 2:
            raise ValueError(f"mdm needs two modalities or more, the data has {', '.join(data.names)}")
        self.base, self.config, self.modalities = base, config, len(data.names)
        self.headline, self.views, self.shown = base.headline, base.views, base.shown
        self.whole = hasattr(base, "loss_of") and hasattr(base, "features") and config.representation == "fused"
        dims = self._dims(data)
        critic = JointCritic(sum(dims), config.hidden)
        with torch.no_grad():
            cast(torch.nn.Linear, critic.mlp.layers[-1]).weight.mul_(0.1)
        self.measure = TotalCorrelation(critic, config.measure, penalty=config.penalty)
        self.codes: tuple[Tensor, Codes] | None = None

    @torch.no_grad()
    def _dims(self, data: Dataset) -> list[int]:
        training = self.base.training
        self.base.eval()
        try:
            batch = data.batch(data.rows("train")[:2])
            return [part.shape[1] for part in self._seen(self._represented(batch))]
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
            z = self.base.features(both.inputs)  # type: ignore[operator]
            found = self.base.loss_of(z[: batch.size], batch)  # type: ignore[operator]
        else:
            found = first.loss(batch)
            with kept_stream():
                z = self._represented(both)
        value = self.value(z[: complete.size], z[complete.size :])
        self.codes = complete.rows, Codes(*(self._input(t).detach() for t in (z[: complete.size], z[complete.size :])))
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
        places = [z] if self.config.balance == "fused" else [p for p in self.base.parameters() if p.requires_grad]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        wanted, extra = (average(torch.autograd.grad(t, places, **options)) for t in (task, gain))
        if self.config.balance == "fused" and not any(bool(g.any()) for g in wanted):
            return task - gain  # a base whose loss does not go through z has nothing to compare with
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
            z = self._represented(self._shuffled(batch))
        return Codes(self._input(z[: batch.size]), self._input(z[batch.size :]))

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

    def value(self, joint: Tensor, product: Tensor) -> Tensor:
        """The measure of fused representations of rows [n, F] and of shuffled rows [m, F]."""
        return self._measured(self._input(joint), self._input(product))

    def scores(self, fused: Tensor) -> Tensor:
        """T of fused representations, [n]."""
        return self._clamped(self.critic(self._input(fused)))

    def _measured(self, joint: Tensor, product: Tensor) -> Tensor:
        t, s = self._clamped(self.critic(torch.cat([joint, product]))).split([len(joint), len(product)])
        return self.measure.estimate(t, s)

    def _clamped(self, scores: Tensor) -> Tensor:
        limit = self.config.clamp
        return scores if self.config.measure == "wasserstein" or not limit else scores.clamp(-limit, limit)

    def _input(self, fused: Tensor) -> Tensor:
        return torch.cat(self._seen(fused), 1)

    def _seen(self, fused: Tensor) -> list[Tensor]:
        """What the critic reads of a fused representation, in parts."""
        parts = [fused]
        if self.config.input == "triple":
            if not hasattr(self.base, "unimodal"):
                raise ValueError("input must be fused: the base has no unimodal parts to make a triple of")
            parts = self.base.unimodal(fused)  # type: ignore[operator]
        bound = self.config.bound
        if bound == "norm" or (bound == "auto" and self.config.measure == "wasserstein"):
            parts = [F.layer_norm(part, part.shape[1:]) for part in parts]
        return parts

    def _represented(self, batch: Batch) -> Tensor:
        name = self.config.representation
        if self.whole:
            return self.base.features(batch.inputs)  # type: ignore[operator]
        found = self.base.representations(batch)
        if name not in found:
            raise ValueError(f"representation must be one of {', '.join(found)}, got {name!r}")
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


@contextmanager
def kept_stream() -> Iterator[None]:
    """Numbers drawn inside are drawn again outside: an extra pass leaves the rest of a step as it was."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield


def build(config: Settings, data: Dataset, base: Model) -> MDM:
    return MDM(base, data, config)
