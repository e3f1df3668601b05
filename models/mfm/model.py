"""The factorized model of sequences: codes, factors, decoders and the objective.

    Z_m = E_m(x_m),  Z_y = E_y(x_1 .. x_M),  F = G(Z) for each of them,  y' = D(F_y),  x_m' = decoder_m([F_y; F_m])
    loss = label(y', y) + sum_m w |x_m' - x_m|^2 + v (sum_m MMD(Z_m, N(0, I)) + MMD(Z_y, N(0, I)))

F_y alone predicts the label; F_m reaches nothing but its own modality. Codes are deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.baselines.supervised import Supervised, outputs_of
from models.batch import Batch, Inputs
from models.data.dataset import Dataset
from models.layers.decoders import decoded_states, sequence_errors
from models.layers.inlet import Inlet
from models.layers.mfn import MemoryFusion, MFNConfig
from models.layers.sequence import LSTMDecoder, LSTMEncoder
from models.mfm.config import VARIANTS, Settings
from models.model import Loss, Model, Phase
from models.shares import by_rows

JOINT, SHARED = "y", "shared"
Codes = dict[str, Tensor]


def side_by_side(inputs: Sequence[Inputs]) -> Inputs:
    return Inputs(torch.cat([x.values for x in inputs], 2), inputs[0].lengths)


class JointEncoder(nn.Module):
    """MFN's features and a linear layer: aligned sequences to Z_y [B, code]."""

    def __init__(self, dims: Sequence[int], settings: Settings):
        super().__init__()
        sizes = {name: settings.networks for name in ("attention", "proposal", "retain", "update")}
        rates = {f"{name}_dropout": settings.network_dropout for name in sizes}
        config = MFNConfig((settings.hidden,) * len(dims), settings.memory, **sizes, **rates)  # type: ignore[arg-type]
        self.fusion = MemoryFusion(dims, config)
        self.out = nn.Linear(self.fusion.out_dim, settings.joint_code)

    def forward(self, inputs: Sequence[Inputs]) -> Tensor:
        return self.out(self.fusion(*inputs))


class TogetherEncoder(nn.Module):
    """An LSTM on sequences side by side: to a code [B, code]."""

    def __init__(self, dims: Sequence[int], code: int):
        super().__init__()
        self.encoder = LSTMEncoder(sum(dims), code, code)

    def forward(self, inputs: Sequence[Inputs]) -> Tensor:
        return self.encoder(side_by_side(inputs))


def factor_map(code: int, factor: int, dropout: float) -> nn.Sequential:
    """G: ReLU(W_2 Drop(ReLU(W_1 z + b_1)) + b_2)."""
    layers = (nn.Linear(code, factor), nn.ReLU(), nn.Dropout(dropout), nn.Linear(factor, factor), nn.ReLU())
    return nn.Sequential(*layers)


class MFMNet(nn.Module):
    """Encoders, maps, decoders and head of aligned sequences [B, T, d_m] that share their lengths."""

    def __init__(self, names: Sequence[str], dims: Sequence[int], settings: Settings, outputs: int):
        super().__init__()
        if JOINT in names or SHARED in names:
            raise ValueError(f"modalities must not be called {JOINT!r} or {SHARED!r}, got {', '.join(names)}")
        self.names, self.dims, self.settings = tuple(names), tuple(dims), settings
        self.parts = parts = VARIANTS[settings.variant]
        private = {"each": self.names, "shared": (SHARED,), "none": ()}[parts.private]
        blocks = (*((JOINT,) if parts.joint else ()), *private)
        code = {name: settings.joint_code if name == JOINT else settings.code for name in blocks}
        factor = {name: settings.joint_factor if name == JOINT else settings.factor for name in blocks}
        self.encoders = nn.ModuleDict({name: self._encoder(name) for name in blocks})
        self.spreads = nn.ModuleDict()
        if settings.regulariser == "kl" and parts.generative:
            self.spreads.update({name: nn.Linear(code[name], code[name]) for name in blocks})
        self.maps = nn.ModuleDict({n: factor_map(code[n], factor[n], settings.dropout) for n in blocks})
        width = factor[JOINT] if parts.joint else sum(factor.values())
        hidden = (nn.Linear(width, width), nn.ReLU(), nn.Dropout(settings.dropout), nn.Linear(width, outputs))
        self.out = nn.Sequential(*hidden)
        self.decoders = nn.ModuleDict()
        if parts.generative:
            widths = {name: sum(factor[b] for b in self.sources(name)) for name in names}
            self.decoders.update({n: LSTMDecoder(widths[n], d) for n, d in zip(names, dims, strict=True)})
        self.surrogate_codes, self.surrogate_joint = nn.ModuleDict(), nn.ModuleDict()
        if settings.surrogate:
            for name in names:
                others = [d for n, d in zip(names, dims, strict=True) if n != name]
                if not others:
                    raise ValueError("surrogate needs two modalities or more")
                self.surrogate_codes[name] = TogetherEncoder(others, settings.code)
                self.surrogate_joint[name] = TogetherEncoder(others, settings.joint_code)

    def _encoder(self, name: str) -> nn.Module:
        settings = self.settings
        if name == JOINT:
            together = settings.encoder == "lstm"
            kind = TogetherEncoder(self.dims, settings.joint_code) if together else JointEncoder(self.dims, settings)
            return kind
        dims = self.dims if name == SHARED else (self.dims[self.names.index(name)],)
        return TogetherEncoder(dims, settings.code)

    def sources(self, name: str) -> list[str]:
        """The factors that a modality is decoded from."""
        private = {"each": [name], "shared": [SHARED], "none": []}[self.parts.private]
        return [JOINT, *private] if self.parts.joint else private

    @by_rows
    def codes(self, inputs: Sequence[Inputs]) -> Codes:
        """Z [B, code] by block: "y", and the modalities' names or "shared"."""
        found = {}
        for name, encoder in self.encoders.items():
            given = inputs if name in (JOINT, SHARED) else [inputs[self.names.index(name)]]
            found[name] = encoder(given)
        return found

    @by_rows
    def surrogates(self, inputs: Sequence[Inputs], name: str) -> tuple[Tensor, Tensor]:
        """Z of one modality and Z_y, from the other modalities alone."""
        others = [x for n, x in zip(self.names, inputs, strict=True) if n != name]
        return self.surrogate_codes[name](others), self.surrogate_joint[name](others)

    def factors(self, codes: Codes) -> Codes:
        return {name: self.maps[name](z) for name, z in codes.items()}

    def read(self, factors: Codes) -> Tensor:
        """What the head reads: F_y, or all factors where there is none."""
        return factors[JOINT] if self.parts.joint else torch.cat(list(factors.values()), 1)

    def head(self, features: Tensor) -> Tensor:
        return self.out(features)

    @by_rows
    def decode(self, factors: Codes, steps: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """x' [B, steps, d] of the named modalities, all by default."""
        names = self.names if names is None else names
        decoders = [cast(LSTMDecoder, self.decoders[name]) for name in names]
        codes = [torch.cat([factors[b] for b in self.sources(name)], 1) for name in names]
        states = decoded_states(decoders, codes, [steps] * len(names))
        return {n: d.out(h) for n, d, h in zip(names, decoders, states, strict=True)}


def prior_distance(codes: Codes, spreads: nn.ModuleDict, *, sampled: bool) -> Tensor:
    """The sum over blocks of the squared MMD between codes and N(0, I), blocks of a width in one call; or of the KL
    divergence in nats, a mean over rows, where there are spreads (the public code sums the rows)."""
    if len(spreads):
        logvars = {name: spreads[name](z) for name, z in codes.items()}
        sums = [(z.square() + logvars[n].exp() - 1 - logvars[n]).sum(1).mean() for n, z in codes.items()]
        return 0.5 * torch.stack(sums).sum()
    together: dict[int, list[Tensor]] = {}
    for z in codes.values():
        together.setdefault(z.shape[1], []).append(z)
    blocks = [torch.stack(same) for same in together.values()]
    draws = [torch.randn_like(z) if sampled else None for z in blocks]
    found = [mk.gaussian_mmd(z, prior_samples=g) for z, g in zip(blocks, draws, strict=True)]
    return torch.cat(found).sum()


class MFM(Supervised):
    """MFM with its head. Terms: "cross_entropy" (nats), "l1" or "mse" of the label; "reconstruction", the sum of the
    modalities' mean squared errors; "prior", see ``prior_distance``; with surrogates "surrogate" (squared errors of
    codes), "label_missing" and "reconstruction_missing", each a sum over the missing modality.

    Trains on rows that have a label and all modalities. A row that misses modalities is predicted with surrogate codes
    where they were learnt (the mean of those of its missing modalities), and with zeros as inputs otherwise.
    """

    net: MFMNet

    def __init__(self, inlet: Inlet, net: MFMNet, data: Dataset, settings: Settings):
        super().__init__(inlet, net, data, settings.loss)
        self.settings = settings

    def codes(self, inputs: Mapping[str, Inputs]) -> Codes:
        """Z by block; surrogates stand in for what a row misses."""
        sequences = self.inlet(inputs)
        found = self.net.codes(sequences)
        masks = {n: inputs[n].mask() for n in self.net.names if inputs[n].present is not None}
        gone = {name: ~mask for name, mask in masks.items() if not bool(mask.all())}
        if not self.settings.surrogate or not gone:
            return found
        joint, count = torch.zeros_like(found[JOINT]), found[JOINT].new_zeros(len(found[JOINT]), 1)
        for name, missing in gone.items():
            code, from_others = self.net.surrogates(sequences, name)
            found[name] = torch.where(missing[:, None], code, found[name])
            joint, count = joint + from_others * missing[:, None], count + missing[:, None]
        found[JOINT] = torch.where(count > 0, joint / count.clamp(min=1), found[JOINT])
        return found

    def features(self, inputs: Mapping[str, Inputs]) -> Tensor:
        return self.net.read(self.net.factors(self.codes(inputs)))

    def representations(self, batch: Batch) -> dict[str, Tensor]:
        """ "F_y" and "F_" with each modality's name ("F_shared" in M_E)."""
        return {f"F_{name}": f for name, f in self.net.factors(self.codes(batch.inputs)).items()}

    def loss(self, batch: Batch) -> Loss:
        sequences = self.inlet(batch.inputs)
        codes = self.net.codes(sequences)
        factors = self.net.factors(codes)
        name, value = self.label_loss(self.net.head(self.net.read(factors)), batch)
        terms, settings = {name: value}, self.settings
        if self.net.parts.generative:
            steps = sequences[0].values.shape[1]
            terms["reconstruction"] = self._errors(self.net.decode(factors, steps), sequences)
            # Validation looks at the exact prior: a resumed run sees the same numbers.
            sampled = settings.prior == "sampled" and self.training
            terms["prior"] = prior_distance(codes, self.net.spreads, sampled=sampled)
        if settings.surrogate:
            terms |= self._missing(sequences, codes, batch)
        reconstruction = settings.reconstruction
        weights = {"reconstruction": reconstruction, "reconstruction_missing": reconstruction}
        return Loss.of(terms, weights | {"prior": settings.prior_weight})

    def _errors(self, decoded: Mapping[str, Tensor], sequences: Sequence[Inputs]) -> Tensor:
        wanted = {name: sequences[self.net.names.index(name)] for name in decoded}
        padding = self.settings.padding
        return torch.stack([sequence_errors(x, wanted[n], padding=padding) for n, x in decoded.items()]).sum()

    def _missing(self, sequences: Sequence[Inputs], codes: Codes, batch: Batch) -> dict[str, Tensor]:
        """The surrogates' terms; only the reconstructions that they need are decoded."""
        names, steps = self.net.names, sequences[0].values.shape[1]
        targets = {n: z.detach() for n, z in codes.items()} if self.settings.detach else codes
        rebuilt = {name: name for name in names}  # the modality that is decoded when a name is missing
        if self.settings.public_slip and len(names) > 1:
            rebuilt = {name: name for name in names[:-1]}
        sums: dict[str, list[Tensor]] = {"surrogate": [], "label_missing": [], "reconstruction_missing": []}
        for name in names:
            code, joint = self.net.surrogates(sequences, name)
            square = nn.functional.mse_loss
            sums["surrogate"].append(square(code, targets[name]) + square(joint, targets[JOINT]))
            factors = self.net.factors(codes | {name: code, JOINT: joint})
            outputs = self.net.head(self.net.read(factors))
            sums["label_missing"].append(self.label_loss(outputs, batch)[1])
            wanted = [rebuilt[name]] if name in rebuilt else []
            if self.settings.public_slip and len(names) > 1 and name == names[-2]:
                wanted.append(names[-1])
            if wanted:
                sums["reconstruction_missing"].append(self._errors(self.net.decode(factors, steps, wanted), sequences))
        return {term: torch.stack(values).sum() for term, values in sums.items()}

    def phases(self) -> list[Phase]:
        return [Phase("main", list(self.parameters()), self.loss, usable=lambda b: b.complete().with_labels())]


def build(settings: Settings, data: Dataset) -> Model:
    inlet = Inlet(data.modalities, settings.embedding, settings.stride, settings.align)
    return MFM(inlet, MFMNet(data.names, inlet.dims, settings, outputs_of(data.target)), data, settings)
