"""Hugging Face text encoders: tokens [B, T] to features [B, H], with a place to change the embedded words.

Needs the package ``transformers`` (the extra ``text``), which is imported when the first encoder is built.

A checkpoint is taken whole or not at all: where the library would draw a weight at random because the file does not
have it, loading is refused. (MIRD's public code loads BERT into a class whose names do not fit the file's and goes on
with a random encoder.) An encoder without a checkpoint is one that the settings ask for, by leaving ``name`` empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from models.batch import Inputs
from models.data.dataset import Modality
from models.data.tokenizer import place, require_transformers
from models.layers.lengths import checked_lengths, mean_over_steps, steps_within
from models.layers.sequence import check_choice, check_positive
from models.layers.transformer import check_heads, check_rate

Shift = Callable[[Inputs], Tensor]
# By kind of encoder, the library's settings that hold dropout; "bert" is every encoder whose embedded words can be
# shifted.
DROPOUTS = {"bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "xlnet": ("dropout",)}


@dataclass(frozen=True)
class TextConfig:
    """Which text encoder.

    name: a checkpoint, as ``models.data.tokenizer`` names it; the data must be read by its tokenizer (data.tokenizer).
        Empty for a BERT of the sizes below with fresh weights, over any tokens.
    hidden, layers, heads, intermediate, positions: of a fresh BERT; those of bert-base are 768, 12, 12, 3072, 512. A
        fresh XLNet (mag-xlnet) has no positions. Refused beside a checkpoint, which has its own.
    dropout: of the encoder's states and attention weights; None for what the checkpoint says (BERT: 0.1).
    readout: "pooler", the tanh layer on the first token's state that BERT has (XLNet: on the last one's); "first", that
        state; or "mean", of all states within the length.
    freeze: the checkpoint's weights are not trained.
    """

    name: str = ""
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 256
    positions: int = 512
    dropout: float | None = None
    readout: str = "pooler"
    freeze: bool = False

    def __post_init__(self) -> None:
        check_choice("readout", self.readout, ("pooler", "first", "mean"))
        check_heads(self.hidden, self.heads)
        check_positive(layers=self.layers, intermediate=self.intermediate, positions=self.positions)
        if self.dropout is not None:
            check_rate("dropout", self.dropout)
        if self.name:
            self._refuse_sizes()
        if self.freeze and not self.name:
            raise ValueError("freeze needs a checkpoint: name is empty, and fresh weights would never learn")

    def _refuse_sizes(self) -> None:
        """Raises ValueError for a size that was set beside a checkpoint, which has its own."""
        defaults = {field.name: field.default for field in fields(self) if field.type == "int"}
        given = [name for name, default in defaults.items() if getattr(self, name) != default]
        if given:
            raise ValueError(
                f"{', '.join(given)} must be left out beside a checkpoint: {self.name!r} has its own sizes"
            )


def no_tokens(what: str, names: Sequence[str], data: str = "") -> ValueError:
    """The error for data without a modality of tokens: many data sets load theirs only if it is named."""
    known = f"{'data ' + repr(data) if data else 'the data'} has {', '.join(names)}"
    return ValueError(f"{what} needs tokens, {known}; name those to load in data.modalities=[...]")


class TextEncoder(nn.Module):
    """Tokens to features [B, out_dim]; ``shift`` may change the embedded words before the first layer.

    What lies beyond a length reaches nothing. padding: True lets padding take part in attention, as public code that
    passes no attention mask does. FLOP per token and layer, forward: 8 H^2 + 4 H I of products, 4 T H of attention.
    """

    kind = "bert"

    def __init__(self, modality: Modality, config: TextConfig | None = None, *, padding: bool = False):
        super().__init__()
        self.config = config = config or TextConfig()
        self.padding = padding
        if not modality.is_tokens:
            raise ValueError(f"a text encoder reads tokens, modality {modality.name!r} holds numbers")
        self.backbone = self._backbone(modality)
        self.hidden = self.out_dim = int(self.backbone.config.hidden_size)
        limit = getattr(self.backbone.config, "max_position_embeddings", None)
        self.limit = limit if limit and limit > 0 else None  # XLNet's is -1
        self.remedy = "lower data.words" if config.name else "raise text.positions"
        self._check_steps(f"modality {modality.name!r}", int(modality.lengths().max()) if len(modality) else 0)
        self.pad = int(self.backbone.config.pad_token_id or 0)
        if config.freeze:
            self.backbone.requires_grad_(False)

    def forward(self, x: Inputs, shift: Shift | None = None) -> Tensor:
        states, pooled, lengths = self.states(x, shift)
        if self.config.readout == "pooler":
            return pooled
        if self.config.readout == "first":
            return states[:, 0]
        if lengths is None:
            return states.mean(1)
        within = steps_within(lengths, states.shape[1])[..., None]
        return mean_over_steps(states.masked_fill(~within, 0), lengths)

    def states(self, x: Inputs, shift: Shift | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The last layer's states [B, T, H], the pooler's output, and the lengths."""
        ids, lengths = self._checked(x)
        mask = None
        if lengths is not None:
            mask = torch.ones_like(ids) if self.padding else steps_within(lengths, ids.shape[1]).long()
        with _shifted(self.backbone, shift, None if self.padding else lengths):
            found = self.backbone(input_ids=ids, attention_mask=mask)
        return found.last_hidden_state, getattr(found, "pooler_output", None), lengths  # type: ignore[return-value]

    def _backbone(self, modality: Modality) -> Any:
        config = self.config
        rates = {} if config.dropout is None else dict.fromkeys(DROPOUTS[self.kind], config.dropout)
        if config.name:
            model = load_backbone(config.name, config.readout, config.dropout, self.kind)
        else:
            model = self._fresh(modality, rates)
        if config.name and modality.tokenizer != config.name:
            read = f"by {modality.tokenizer!r}" if modality.tokenizer else "as words of the data's own"
            raise ValueError(
                f"text.name is {config.name!r}, but modality {modality.name!r} is read {read}: "
                f"set data.tokenizer={config.name}"
            )
        if modality.vocabulary > model.config.vocab_size:
            known = model.config.vocab_size
            raise ValueError(f"modality {modality.name!r} has {modality.vocabulary} tokens, the encoder knows {known}")
        if config.readout != "pooler" and getattr(model, "pooler", None) is not None:
            model.pooler = None  # its weights would never see a gradient
        return model

    def _fresh(self, modality: Modality, rates: dict[str, float]) -> Any:
        transformers, config = require_transformers(), self.config
        sizes = transformers.BertConfig(
            vocab_size=modality.vocabulary,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate,
            max_position_embeddings=config.positions,
            **rates,
        )
        return transformers.BertModel(sizes)

    def _check_steps(self, name: str, steps: int) -> None:
        if self.limit is not None and steps > self.limit:
            raise ValueError(f"{name} must have at most {self.limit} tokens a row, got {steps}: {self.remedy}")

    def _checked(self, x: Inputs) -> tuple[Tensor, Tensor | None]:
        ids = x.values
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.dtype != torch.int64:
            raise ValueError(f"x must have int64 tokens [batch, steps] with a step, got {ids.dtype} {tuple(ids.shape)}")
        self._check_steps("x", ids.shape[1])
        lengths = checked_lengths("x", x.lengths, ids)
        if lengths is None:
            return ids, None
        ids = ids.masked_fill(~steps_within(lengths, ids.shape[1]), self.pad)
        # A missing text reads one padding token, as every layer does with a missing sequence.
        return ids, lengths.clamp(min=1)


@contextmanager
def _shifted(backbone: Any, shift: Shift | None, lengths: Tensor | None) -> Iterator[None]:
    """Passes embedded words (token, position and type, normed) through ``shift`` on their way to the first layer."""
    if shift is None:
        yield
        return
    handle = backbone.embeddings.register_forward_hook(lambda module, given, found: shift(Inputs(found, lengths)))
    try:
        yield
    finally:
        handle.remove()


def load_backbone(name: str, readout: str = "pooler", dropout: float | None = None, kind: str = "bert") -> Any:
    """A Hugging Face encoder with every weight from its checkpoint.

    kind: a key of ``DROPOUTS``. Raises ValueError for a checkpoint of another kind and for weights that the checkpoint
    does not have or has in another shape, by name (those of a pooler count only when it is read), or
    FileNotFoundError.
    """
    transformers = require_transformers()
    rates = {} if dropout is None else dict.fromkeys(DROPOUTS[kind], dropout)
    with _without_bars(transformers), _named(name):
        is_xlnet = transformers.AutoConfig.from_pretrained(place(name)).model_type == "xlnet"
    if is_xlnet != (kind == "xlnet"):
        wanted = "is XLNet, which the model mag-xlnet alone reads" if is_xlnet else "is no XLNet; mag-bert may read it"
        raise ValueError(f"text.name: the checkpoint {name!r} {wanted}")
    with _without_bars(transformers), _named(name):
        model, report = transformers.AutoModel.from_pretrained(place(name), output_loading_info=True, **rates)
    pooled = readout == "pooler" and not is_xlnet
    lacking = {str(key) for key in report["missing_keys"]} | {str(key) for key, *_ in report["mismatched_keys"]}
    random = sorted(key for key in lacking if pooled or not key.startswith("pooler."))
    if random:
        shown = ", ".join(random[:3]) + (f" and {len(random) - 3} more" if len(random) > 3 else "")
        hint = "; readout=first or mean reads no pooler" if all(key.startswith("pooler.") for key in random) else ""
        raise ValueError(f"text encoder {name!r}: the checkpoint does not have {shown}, which would be random{hint}")
    if not is_xlnet and not isinstance(getattr(model, "embeddings", None), nn.Module):
        raise ValueError(f"text.name: {type(model).__name__} has no module 'embeddings' whose output can be shifted")
    if pooled and getattr(model, "pooler", None) is None:
        raise ValueError(f"text encoder {name!r} has no pooler: set readout to first or mean")
    return model.float()


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of the library in one line that names the checkpoint."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"text encoder {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """No progress bar and no table of missing weights: what matters of it is an error here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
