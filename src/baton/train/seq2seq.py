"""Encoder-decoder training: padded micro-batches of like length, and their loss."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from baton.train.batch import TokenSource
from baton.train.cursor import Indices
from baton.train.layers import layers_of, plain_layers
from baton.train.loss import linear_cross_entropy

# Shapes times kinds of blocks; torch gives up compiling after 8 unless told otherwise.
_MOST_COMPILED = 256


@dataclass(frozen=True)
class PairBatch:
    """Pairs side by side, padded on the right.

    Attributes:
        input_ids: `(rows, width)` int64, prompts.
        mask: `(rows, width)` bool, True at a token; None where there are no pads.
        decoder_ids: `(rows, response width)` int64: the responses shifted right by the start
            token. They need no mask: the decoder looks back only, and pads come last.
        predicts: `(labelled,)` int64: positions in the flattened decoder that carry loss.
        labels: `(labelled,)` int64: the tokens that belong there.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor | None
    decoder_ids: torch.Tensor
    predicts: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Pairs of like length side by side: a `Batching` for encoder-decoder models.

    Attributes:
        pad_to: widths are multiples of this.
        fixed_rows: every micro-batch of some widths has the same number of rows, empty ones
            included, so that compiled code fits.
        pin: copy through pinned memory, so that the device need not wait.
    """

    device: torch.device
    pad: int
    start: int
    pad_to: int = 8
    fixed_rows: bool = False
    pin: bool = True

    def cut(
        self, source: TokenSource, indices: Indices, *, ranks: int, budget: int
    ) -> list[list[list[int]]]:
        """Samples in the order of their lengths go to the ranks in turn; each rank fills bins.

        A bin's rows times its widths are at most `budget`; one pair is never too much.
        """
        responses = source.labelled(indices)
        prompts = source.lengths(indices) - responses
        longest_first = np.lexsort((np.arange(len(indices)), -prompts, -responses))
        widths = np.stack((self._widths(prompts), self._widths(responses)), axis=1)
        return [
            self._bins(longest_first[rank::ranks].tolist(), widths, budget) for rank in range(ranks)
        ]

    def _bins(self, order: list[int], widths: NDArray[np.int64], budget: int) -> list[list[int]]:
        bins: list[list[int]] = []
        widest = np.zeros(2, np.int64)
        for position in order:
            wider = np.maximum(widest, widths[position])
            if not bins or (len(bins[-1]) + 1) * int(wider.sum()) > budget:
                bins.append([])
                wider = widths[position]
            bins[-1].append(position)
            widest = wider
        return bins

    def _widths(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        return -(-lengths // self.pad_to) * self.pad_to

    def collate(self, source: TokenSource, indices: Indices, *, budget: int) -> PairBatch:
        """One micro-batch, on its device."""
        samples = [source.sample(index) for index in indices.tolist()]
        prompts = np.array([prompt for _, prompt in samples])
        responses = np.array([len(tokens) for tokens, _ in samples]) - prompts
        width, depth = int(self._widths(prompts).max()), int(self._widths(responses).max())
        rows = len(samples)
        if self.fixed_rows:
            rows = max(rows, budget // (width + depth))
        input_ids = np.full((rows, width), self.pad)
        decoder_ids = np.full((rows, depth), self.pad)
        mask = np.zeros((rows, width), np.bool_)
        # A row that may look nowhere would be divided by zero.
        mask[len(samples) :, 0] = True
        decoder_ids[:, 0] = self.start
        for row, (tokens, prompt) in enumerate(samples):
            input_ids[row, :prompt] = tokens[:prompt]
            mask[row, :prompt] = True
            decoder_ids[row, 1 : len(tokens) - prompt] = tokens[prompt:-1]
        predicts = [row * depth + np.arange(length) for row, length in enumerate(responses)]
        return PairBatch(
            input_ids=self._moved(input_ids),
            mask=None if mask.all() else self._moved(mask),
            decoder_ids=self._moved(decoder_ids),
            predicts=self._moved(np.concatenate(predicts)),
            labels=self._moved(np.concatenate([tokens[prompt:] for tokens, prompt in samples])),
        )

    def least(self, source: TokenSource, indices: Indices) -> int:
        return int(source.lengths(indices).max())

    def _moved(self, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor
        if not self.pin:
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


class Seq2SeqLoss:
    """The summed cross-entropy of a micro-batch under a T5, the head on labelled tokens only."""

    def __init__(self, network: Any, *, compute_dtype: torch.dtype) -> None:
        config = network.config
        self.network = network
        self.compute_dtype = compute_dtype
        # A tied head sees embeddings of unit scale (Raffel et al., 2020).
        tied = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
        self.scale = config.d_model**-0.5 if tied else 1.0

    def __call__(self, batch: PairBatch) -> torch.Tensor:
        """Sum of the loss over labelled tokens: a float32 scalar, with gradient if any is wanted.

        Without one, blocks run uncompiled: a dev set is not worth another compilation.
        """
        if torch.is_grad_enabled():
            return self._of(batch)
        with plain_layers(self.network):
            return self._of(batch)

    def _of(self, batch: PairBatch) -> torch.Tensor:
        network = self.network
        encoded = network.encoder(
            input_ids=batch.input_ids, attention_mask=batch.mask
        ).last_hidden_state
        device = encoded.device.type
        if torch.is_autocast_enabled(device):
            # Or each layer of the decoder would do so, and its gradients be added up in float32.
            encoded = encoded.to(torch.get_autocast_dtype(device))
        decoded = network.decoder(
            input_ids=batch.decoder_ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=batch.mask,
            use_cache=False,
        )
        hidden = decoded.last_hidden_state.flatten(0, 1).index_select(0, batch.predicts)
        return linear_cross_entropy(
            hidden * self.scale,
            network.lm_head.weight,
            batch.labels,
            compute_dtype=self.compute_dtype,
        )


def compile_blocks(network: Any, **options: Any) -> None:
    """Compile every block of encoder and decoder at its first call; those alike share the code.

    And the norms after the last ones, which would take a dozen passes over memory.
    """
    torch._dynamo.config.recompile_limit = _MOST_COMPILED
    for block in layers_of(network):
        block.forward = torch.compile(block.forward, **options)
    for stack in (network.encoder, network.decoder):
        norm = stack.final_layer_norm
        norm.forward = _where_learning(torch.compile(norm.forward, **options), norm.forward)


def _where_learning(
    compiled: Callable[[torch.Tensor], torch.Tensor], plain: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """`compiled` where there are gradients: generation has a new shape at every token."""

    @functools.wraps(plain)
    def forward(x: torch.Tensor) -> torch.Tensor:
        return compiled(x) if torch.is_grad_enabled() else plain(x)

    return forward
