"""Teacher-free decoding of several modalities, and what the decoded sequences are compared with.

A decoder (`models.layers.LSTMDecoder`) unrolls a code: step 0 reads the code, every later step its own last state, so
neither data nor lengths enter. MFM (Tsai et al., ICLR 2019) and MIRD share this recurrence and differ around it:

    MFM    code [f_y; f_m], as many steps as the batch has, squared errors averaged over all steps, padding included
    MIRD   code [z_S; z_m], the steps of each modality, words scored by cross entropy over the vocabulary

Here padding is left out of every average unless ``padding=True`` asks for the public code's form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mi_kernels as mk
from models.batch import Inputs
from models.layers.lengths import checked_lengths, steps_within
from models.layers.sequence import LSTMDecoder, check_positive
from models.layers.vocabulary import BLOCK, vocabulary_cross_entropy


def decoded_states(decoders: Sequence[LSTMDecoder], codes: Sequence[Tensor], steps: Sequence[int]) -> list[Tensor]:
    """States h [B, steps_m, H_m] of every decoder from its code [B, H_m], before the output layers.

    Decoders of one width and number of steps run as groups of one call. FLOP per item, forward: 8 steps H^2 each.
    Raises ValueError for codes or steps that do not fit the decoders.
    """
    if not len(decoders) == len(codes) == len(steps):
        raise ValueError(f"codes and steps must be one per decoder, {len(decoders)}, got {len(codes)} and {len(steps)}")
    together: dict[tuple[int, int], list[int]] = {}
    for m, (decoder, code, number) in enumerate(zip(decoders, codes, steps, strict=True)):
        if code.dim() != 2 or code.shape[1] != decoder.hidden:
            raise ValueError(f"codes[{m}] must have shape [batch, {decoder.hidden}], got {tuple(code.shape)}")
        check_positive(**{f"steps[{m}]": number})
        together.setdefault((decoder.hidden, number), []).append(m)
    found: dict[int, Tensor] = {}
    for (_, number), members in together.items():
        weights = [_weights(decoders[m], codes[m]) for m in members]
        if len(members) == 1:
            found[members[0]] = mk.lstm_decode(*weights[0], number)
        else:
            code, *layers = (torch.stack(parts) for parts in zip(*weights, strict=True))
            states = mk.lstm_decode(code, layers[0], layers[1], layers[2], layers[3], number)
            found |= dict(zip(members, states.unbind(0), strict=True))
    return [found[m] for m in range(len(decoders))]


def _weights(decoder: LSTMDecoder, code: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return code, decoder.weight_ih, decoder.weight_hh, decoder.bias_ih, decoder.bias_hh


def sequence_errors(found: Tensor, wanted: Inputs, *, padding: bool = False) -> Tensor:
    """Mean squared error [] of sequences [B, T, D] over the steps that rows have; a row without one counts nothing.

    padding: the public code's average over all B T D numbers, where what lies beyond a length is a target of zeros.
    """
    if found.shape != wanted.values.shape:
        raise ValueError(f"found must have the shape of wanted, {tuple(wanted.values.shape)}, got {tuple(found.shape)}")
    lengths = checked_lengths("wanted", wanted.lengths, wanted.values)
    if lengths is None:
        return (found - wanted.values).square().mean()
    within = steps_within(lengths.to(found.device), found.shape[1])[..., None]
    # Padding may hold NaN, whose gradient a mask after the square would not stop.
    errors = (found - wanted.values.masked_fill(~within, 0)).square()
    if padding:
        return errors.mean()
    return errors.masked_fill(~within, 0).sum() / (within.sum() * found.shape[2]).clamp(min=1)


def token_cross_entropy(states: Tensor, out: nn.Linear, tokens: Inputs, block: int = BLOCK) -> Tensor:
    """Mean cross entropy [] in nats of tokens [B, T] under ``out`` of states [B, T, H], over the steps rows have.

    At most ``block`` logits exist at a time; see vocabulary.py. FLOP: 6 V H a step, 2 V H without gradients.
    """
    if states.dim() != 3 or states.shape[:2] != tokens.values.shape:
        shape = tuple(tokens.values.shape)
        raise ValueError(f"states must have shape [batch, steps, width] for tokens {shape}, got {tuple(states.shape)}")
    if tokens.lengths is None:
        rows, wanted = states.flatten(0, 1), tokens.values.flatten()
    else:
        within = steps_within(tokens.lengths.to(states.device), states.shape[1])
        rows, wanted = states[within], tokens.values[within]
    if not len(rows):
        return states.sum() * 0
    return vocabulary_cross_entropy(rows, out.weight, out.bias, wanted, block=block)
