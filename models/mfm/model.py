"""The factorized model of sequences: codes, factors, decoders and the objective.

    Z_m = E_m(x_m),  Z_y = E_y(x_1 .. x_M),  F = G(Z) for each of them,  y' = D(F_y),  x_m' = decoder_m([F_y; F_m])
    loss = label(y', y) + sum_m w |x_m' - x_m|^2 + v (sum_m MMD(Z_m, N(0, I)) + MMD(Z_y, N(0, I)))

Only F_y predicts the label, and F_m is used only for its own modality. Codes are deterministic.
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
from models.layers.dropout import Dropout
from models.layers.inlet import Inlet
from models.layers.named import Named
from models.layers.pictures import PictureDecoder
from models.layers.sequence import LSTMDecoder
from models.mfm.config import VARIANTS, Settings
from models.mfm.encoders import JointEncoder, SeparateEncoder, Shape, TogetherEncoder, factor_map
from models.model import Loss, Model, Phase
from models.shares import by_rows

JOINT, SHARED = "y", "shared"
Codes = dict[str, Tensor]


class MFMNet(nn.Module):
    """Encoders, maps, decoders and head of sequences [B, T, d_m]: aligned ones that share their lengths, unless the
    encoder is "separate". shapes: (height, width) of the modalities that are pictures, [B, 1, height width]."""

    def __init__(
        self,
        names: Sequence[str],
        dims: Sequence[int],
        settings: Settings,
        outputs: int,
        shapes: Sequence[Shape] = (),
    ):
        super().__init__()
        if JOINT in names or SHARED in names:
            raise ValueError(f"modalities must not be called {JOINT!r} or {SHARED!r}, got {', '.join(names)}")
        self.names, self.dims, self.settings = tuple(names), tuple(dims), settings
        drawn = settings.pictures == "convolution" and bool(shapes)
        self.shapes: tuple[Shape, ...] = tuple(shapes) if drawn else (None,) * len(self.names)
        self.parts = parts = VARIANTS[settings.variant]
        if parts.crossed and len(self.names) < 2:
            raise ValueError(f"variant {settings.variant} needs two modalities or more, got {', '.join(names)}")
        private = {"each": self.names, "shared": (SHARED,), "none": ()}[parts.private]
        blocks = (*((JOINT,) if parts.joint else ()), *private)
        code = self._sizes("code", private) | {JOINT: settings.joint_code}
        factor = self._sizes("factor", private) | ({JOINT: settings.joint_factor} if parts.joint else {})
        self.encoders = Named({name: self._encoder(name, code[name]) for name in blocks})
        self.spreads = Named()
        if settings.regulariser == "kl" and parts.generative:
            self.spreads.update({name: nn.Linear(code[name], code[name]) for name in blocks})
        self.maps = Named({n: factor_map(code[n], factor[n], settings.dropout) for n in blocks})
        width = factor[JOINT] if parts.joint else sum(factor.values())
        hidden = (nn.Linear(width, width), nn.ReLU(), Dropout(settings.dropout), nn.Linear(width, outputs))
        self.out = nn.Sequential(*hidden)
        self.decoders = Named()
        if parts.generative:
            widths = {name: sum(factor[b] for b in self.sources(name)) for name in names}
            for name, dim, shape in zip(names, dims, self.shapes, strict=True):
                width = widths[name]
                self.decoders[name] = LSTMDecoder(width, dim) if shape is None else PictureDecoder(width, shape)
        self.surrogate_codes, self.surrogate_joint = Named(), Named()
        if settings.surrogate:
            for name in names:
                others = [n for n in names if n != name]
                if not others:
                    raise ValueError("surrogate needs two modalities or more")
                self.surrogate_codes[name] = self._together(others, code[name])
                self.surrogate_joint[name] = self._together(others, settings.joint_code)

    def _sizes(self, name: str, blocks: Sequence[str]) -> dict[str, int]:
        return dict(zip(blocks, self.settings.widths(name, len(blocks)), strict=True)) if blocks else {}

    def _encoder(self, name: str, code: int) -> nn.Module:
        if name == JOINT and self.settings.encoder == "mfn":
            return JointEncoder(self.dims, self.settings)
        return self._together(self.read_by(name), code)

    def read_by(self, block: str) -> list[str]:
        """The modalities from which the code of a block is computed."""
        if block in (JOINT, SHARED):
            return list(self.names)
        return [name for name in self.names if name != block] if self.parts.crossed else [block]

    def _together(self, names: Sequence[str], code: int) -> nn.Module:
        """An encoder of the named modalities to one code, without memory fusion."""
        places = [self.names.index(name) for name in names]
        dims = [self.dims[place] for place in places]
        if self.settings.encoder != "separate":
            return TogetherEncoder(dims, code)
        hidden = self.settings.widths("hidden", len(self.names))
        return SeparateEncoder(dims, [self.shapes[p] for p in places], [hidden[p] for p in places], code)

    def sources(self, name: str) -> list[str]:
        """The factors from which a modality is decoded."""
        private = {"each": [name], "shared": [SHARED], "none": []}[self.parts.private]
        return [JOINT, *private] if self.parts.joint else private

    @by_rows
    def codes(self, inputs: Sequence[Inputs]) -> Codes:
        """Z [B, code] by block: "y", and the modalities' names or "shared"."""
        found = {}
        for name, encoder in self.encoders.items():
            found[name] = encoder([inputs[self.names.index(source)] for source in self.read_by(name)])
        return found

    @by_rows
    def surrogates(self, inputs: Sequence[Inputs], name: str) -> tuple[Tensor, Tensor]:
        """Z of one modality and Z_y, computed only from the other modalities."""
        others = [x for n, x in zip(self.names, inputs, strict=True) if n != name]
        return self.surrogate_codes[name](others), self.surrogate_joint[name](others)

    def factors(self, codes: Codes) -> Codes:
        return {name: self.maps[name](z) for name, z in codes.items()}

    def read(self, factors: Codes) -> Tensor:
        """The input of the head: F_y, or all factors if there is no F_y; detached in "seq2seq"."""
        found = factors[JOINT] if self.parts.joint else torch.cat(list(factors.values()), 1)
        return found.detach() if self.parts.crossed else found

    def head(self, features: Tensor) -> Tensor:
        return self.out(features)

    @by_rows
    def decode(
        self, factors: Codes, steps: int | Mapping[str, int], names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """x' [B, steps, d] of the named modalities, all by default; steps: of all of them, or by name."""
        names = self.names if names is None else names
        codes = {name: torch.cat([factors[b] for b in self.sources(name)], 1) for name in names}
        unrolled = [name for name in names if isinstance(self.decoders[name], LSTMDecoder)]
        decoders = [cast(LSTMDecoder, self.decoders[name]) for name in unrolled]
        number = [steps if isinstance(steps, int) else steps[name] for name in unrolled]
        states = decoded_states(decoders, [codes[name] for name in unrolled], number)
        found = {n: d.out(h) for n, d, h in zip(unrolled, decoders, states, strict=True)}
        return {name: found[name] if name in found else self.decoders[name](codes[name]) for name in names}


def steps_of(names: Sequence[str], sequences: Sequence[Inputs]) -> dict[str, int]:
    return {name: x.values.shape[1] for name, x in zip(names, sequences, strict=True)}


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

    Trains on rows that have a label and all modalities. For a row with missing modalities, predictions use surrogate
    codes if they were learnt (the mean over its missing modalities), otherwise zeros as inputs.
    """

    net: MFMNet

    def __init__(self, inlet: Inlet, net: MFMNet, data: Dataset, settings: Settings):
        super().__init__(inlet, net, data, settings.loss)
        self.settings = settings

    def codes(self, inputs: Mapping[str, Inputs]) -> Codes:
        """Z by block; surrogates replace the codes of missing modalities."""
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

    def rebuilt(self, inputs: Mapping[str, Inputs], name: str) -> tuple[Tensor, Inputs]:
        """A modality decoded without having been observed, [B, T, d], and the true one. It is decoded from the other
        modalities in "seq2seq", from surrogate codes if they were learnt, and otherwise from codes of inputs in which
        it is zero."""
        sequences = self.inlet(inputs)
        net, place = self.net, self.net.names.index(name)
        hidden = [x._replace(values=x.values * 0) if m == place else x for m, x in enumerate(sequences)]
        codes = net.codes(hidden)
        if self.settings.surrogate:
            code, joint = net.surrogates(sequences, name)
            codes |= {name: code, JOINT: joint}
        steps = steps_of(net.names, sequences)
        return net.decode(net.factors(codes), steps, [name])[name], sequences[place]

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
            decoded = self.net.decode(factors, steps_of(self.net.names, sequences))
            terms["reconstruction"] = self._errors(decoded, sequences)
            # Validation uses the exact prior, so that a resumed run gets the same numbers.
            sampled = settings.prior == "sampled" and self.training
            terms["prior"] = prior_distance(codes, self.net.spreads, sampled=sampled)
        if settings.surrogate and not settings.surrogate_phase:
            terms |= self._missing(sequences, codes, batch)
        return self._weighted(terms)

    def surrogate_loss(self, found: tuple[Batch, Sequence[Inputs], Codes]) -> Loss:
        """The terms of the surrogates alone, for a batch, its sequences and its codes."""
        batch, sequences, codes = found
        return self._weighted(self._missing(sequences, codes, batch))

    def _frozen(self, batch: Batch) -> tuple[Batch, Sequence[Inputs], Codes]:
        sequences = self.inlet(batch.inputs)
        return batch, sequences, self.net.codes(sequences)

    def _weighted(self, terms: dict[str, Tensor]) -> Loss:
        reconstruction = self.settings.reconstruction
        weights = {"reconstruction": reconstruction, "reconstruction_missing": reconstruction}
        return Loss.of(terms, weights | {"prior": self.settings.prior_weight})

    def _errors(self, decoded: Mapping[str, Tensor], sequences: Sequence[Inputs]) -> Tensor:
        wanted = {name: sequences[self.net.names.index(name)] for name in decoded}
        padding = self.settings.padding
        return torch.stack([sequence_errors(x, wanted[n], padding=padding) for n, x in decoded.items()]).sum()

    def _missing(self, sequences: Sequence[Inputs], codes: Codes, batch: Batch) -> dict[str, Tensor]:
        """The terms of the surrogates; decodes only the reconstructions that they need."""
        names, steps = self.net.names, steps_of(self.net.names, sequences)
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
        usable = Batch.complete_with_labels
        if not self.settings.surrogate_phase:
            return [Phase("main", list(self.parameters()), self.loss, usable=usable)]
        surrogates = [*self.net.surrogate_codes.parameters(), *self.net.surrogate_joint.parameters()]
        own = {id(p) for p in surrogates}
        main = [p for p in self.parameters() if id(p) not in own]
        return [
            Phase("main", main, self.loss, usable=usable),
            Phase("surrogate", surrogates, self.surrogate_loss, fixed=self._frozen, usable=usable),
        ]


def build(settings: Settings, data: Dataset) -> Model:
    align = 0 if settings.encoder == "separate" else settings.align
    inlet = Inlet(data.modalities, settings.embedding, settings.stride, align)
    shapes = [modality.shape for modality in data.modalities]
    return MFM(inlet, MFMNet(data.names, inlet.dims, settings, outputs_of(data.target), shapes), data, settings)
