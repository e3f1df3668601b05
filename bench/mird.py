"""Times a training step of MIRD on this CPU, ours and the public formulation, and measures the memory of the text
decoder.

    python -m bench.mird --json bench/results/cpu_mird.json

The public formulation is plain torch on the same weights with the same text encoder, as the public code computes it:
LSTM cells stepped in Python, sparsemax by sorting over frames brought to the words' width, all logits of the words,
CLUB with B x B x D differences one pair at a time, and five more passes for the estimators' steps: forward through the
whole model, decoders and head included, backward through estimators and encoders. Both arms start from the same loss,
which is checked. "gflop" counts the matrix products of a step (ours: those of the same step on plain torch operators),
and "of_fp32_peak" is their rate over that of fp32 multiply-adds on registers. Needs the extra ``text``; under five
minutes on one quiet core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from bench import peak
from bench.machine import described, peak_mebibytes
from models.batch import Target
from models.data import Dataset, Modality
from models.layers.text import TextConfig
from models.layers.vocabulary import vocabulary_cross_entropy
from models.mird import MIRD, Settings

WORDS, VOCABULARY = 50, 30_522
SIZES = {"batch": 16, "words": WORDS, "audio": (400, 33), "visual": (55, 709), "vocabulary": VOCABULARY}
ENCODER = TextConfig(hidden=128, layers=2, heads=2, intermediate=512)


def problem(batch: int) -> Dataset:
    """Full-length random rows: nothing is padding, so that both formulations do the same work."""
    torch.manual_seed(0)

    def ends(steps: int) -> torch.Tensor:
        return torch.arange(batch + 1) * steps

    modalities = (
        Modality("text", torch.randint(1, VOCABULARY, (batch * WORDS,)), ends(WORDS), vocabulary=VOCABULARY),
        Modality("audio", torch.randn(batch * 400, 33), ends(400)),
        Modality("visual", torch.randn(batch * 55, 709), ends(55)),
    )
    return Dataset("bench", modalities, torch.randn(batch), Target.regression(), torch.zeros(batch, dtype=torch.int64))


def cells(cell, x, h=None, steps=0):
    """Hidden states of a cell over x [B, T, D], or of a decoder that starts from h and reads its own states."""
    given = x[:, 0] if h is None else h
    state = torch.zeros(len(given), cell.hidden)
    c, found = torch.zeros_like(state), []
    for step in range(steps or x.shape[1]):
        given = x[:, step] if h is None else (given if step == 0 else state)
        gates = F.linear(given, cell.weight_ih, cell.bias_ih) + F.linear(state, cell.weight_hh, cell.bias_hh)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        state = o.sigmoid() * c.tanh()
        found.append(state)
    return torch.stack(found, 1)


def sparsemax(z):
    ordered = z.sort(dim=-1, descending=True).values
    k = torch.arange(1, z.shape[-1] + 1)
    total = ordered.cumsum(-1)
    size = (1 + k * ordered > total).sum(-1, keepdim=True)
    return (z - (total.gather(-1, size - 1) - 1) / size).clamp(min=0)


class Public:
    """The public formulation on a MIRD's own weights."""

    def __init__(self, model: MIRD, data: Dataset):
        self.model = model
        self.batch = data.batch(torch.arange(len(data)))

    def codes(self):
        model, inputs = self.model, self.batch.inputs
        frames = [inputs["audio"].values, inputs["visual"].values]

        def shift(words):
            module, e, total = model.agnostic.shift, words.values, 0.0
            for linear, gate, out, x in zip(module.keys, module.gate.gates, module.gate.shifts, frames, strict=True):
                found = sparsemax(e @ linear(x).mT) @ x
                total = total + gate(torch.cat([found, e], 2)).relu() * out(found)
            size = total.norm(dim=2, keepdim=True)
            alpha = (e.norm(dim=2, keepdim=True) / (size + 1e-6)).clamp(max=1)
            return module.gate.dropout(module.gate.norm(alpha * total + e))

        agnostic = model.agnostic.out(model.agnostic.text(inputs["text"], shift))
        own = [model.specific[0](inputs["text"])]
        for encoder, x in zip(list(model.specific)[1:], frames, strict=True):
            own.append(encoder.encoder.out(cells(encoder.encoder.lstms[0], x)[:, -1]))
        return [agnostic, *own]

    def club(self, codes):
        """Log-densities of all pairs, one estimator at a time: their fit and the bound."""
        fits, bounds = 0.0, 0.0
        weights = dict(self.model.club.named_parameters())
        for group, (a, b) in enumerate(self.model.pairs):
            x, y = codes[a], codes[b]

            def net(part, group=group, x=x):
                w = [weights[f"{part}.{layer}.{kind}"][group] for layer in (0, 2) for kind in ("weight", "bias")]
                return (x @ w[0].mT + w[1]).relu() @ w[2].mT + w[3]

            mu, logvar = net("p_mu"), 6 * (net("p_logvar") / 6).tanh()
            own = -((mu - y).square()) / logvar.exp()
            others = -((y[None] - mu[:, None]).square().mean(1)) / logvar.exp()
            bounds = bounds + 0.5 * (own - others).sum(1).mean()
            fits = fits - 0.5 * (own - logvar).sum(1).mean()
        return fits, bounds

    def forward(self):
        """Codes, what the decoders give for every modality, and the prediction."""
        model, codes = self.model, self.codes()
        decoded = [
            decoder.out(cells(decoder, None, torch.cat([codes[0], z], 1), self.batch.inputs[name].values.shape[1]))
            for decoder, name, z in zip(model.decoders, model.names, codes[1:], strict=True)
        ]
        return codes, decoded, model.head(torch.cat(codes, 1))

    def losses(self):
        codes, decoded, predicted = self.forward()
        total = self.model.scale.loss(predicted, self.batch.target).log()
        for name, out in zip(self.model.names, decoded, strict=True):
            x = self.batch.inputs[name].values
            error = F.mse_loss(out, x) if name != "text" else F.cross_entropy(out.flatten(0, 1), x.flatten())
            total = total + error.log()
        return total + self.club(codes)[1]


def timed(rounds: int) -> dict:
    data = problem(SIZES["batch"])
    settings = Settings(text=ENCODER, as_published=("unbounded_mi", "bare_log"), dropout=0.0)
    model = MIRD(settings, data)
    public, (main, club) = Public(model, data), model.phases()
    batch = data.batch(torch.arange(len(data)))
    model.eval()  # no dropout: the same loss, so that the comparison is of the same computation
    model.training = True
    ours, theirs = (float(value.detach()) for value in (model.loss(batch).total, public.losses()))
    if abs(ours - theirs) > 1e-3 * abs(theirs):
        raise RuntimeError(f"the formulations differ: {ours} and {theirs}")
    optimizers = [torch.optim.AdamW(phase.parameters, lr=1e-5) for phase in (main, club)]

    def step_ours():
        for p in club.parameters:
            p.requires_grad_(False)
        optimizers[0].zero_grad()
        main.loss(batch).total.backward()
        optimizers[0].step()
        for p in club.parameters:
            p.requires_grad_(True)
        with torch.no_grad():
            fixed = club.fixed(batch)
        for _ in range(club.steps):
            optimizers[1].zero_grad()
            club.loss(fixed).total.backward()
            optimizers[1].step()

    def step_public():
        model.zero_grad()
        public.losses().backward()
        optimizers[0].step()
        for _ in range(club.steps):
            codes, _, _ = public.forward()
            optimizers[1].zero_grad()
            public.club(codes)[0].backward()
            optimizers[1].step()

    arms = {"ours": step_ours, "public": step_public}
    flop = {name: peak.products(run) for name, run in arms.items()}
    for run in arms.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    most = peak.gflops()
    return {
        "sizes": SIZES,
        "text_encoder": dataclasses.asdict(ENCODER),
        "loss": [ours, theirs],
        "median_seconds": medians,
        "least_seconds": {name: min(values) for name, values in times.items()},
        "times_faster": medians["public"] / medians["ours"],
        "gflop": {name: round(value / 1e9, 2) for name, value in flop.items()},
        "of_fp32_peak": {name: peak.share(flop[name], medians[name], most) for name in arms},
        "target": 4.0,
    }


def decoder(kind: str) -> float:
    """Peak MiB that the words' loss and its gradients add at B = 144, T = 50; in a process of its own."""
    torch.manual_seed(0)
    h = torch.randn(144 * 50, 128, requires_grad=True)
    weight, bias = torch.randn(VOCABULARY, 128, requires_grad=True), torch.zeros(VOCABULARY, requires_grad=True)
    target = torch.randint(VOCABULARY, (len(h),))

    def run() -> None:
        if kind == "ours":
            vocabulary_cross_entropy(h, weight, bias, target).backward()
        else:
            F.cross_entropy(F.linear(h, weight, bias), target).backward()

    return peak_mebibytes(run)


def memory() -> dict:
    peaks = {}
    for kind in ("ours", "plain"):
        command = [sys.executable, "-m", "bench.mird", "--decoder", kind]
        peaks[kind] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"batch": 144, "steps": 50, "peak_mib": peaks, "times_less": peaks["plain"] / peaks["ours"], "target": 20.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decoder", choices=("ours", "plain"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.decoder:
        print(decoder(given.decoder))
        return
    found = {"machine": described(), "step": timed(given.rounds), "text_decoder": memory()}
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
