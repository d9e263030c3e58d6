"""The soft token as attention over the vocabulary, in Triton: logits and probabilities are never stored.

Knows pointers and tiles; which products are made this way, and whether it pays, is `fused_soft_token.py`'s. The
softmax is computed online (arXiv 1805.02867): a program goes through one part of the vocabulary with a running maximum
and a running sum, and the parts are put together afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soft_token_forward(
    hidden, head, table, mixed_out, largest_out, total_out, rows, tokens, width, scale, tokens_a_part,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one part of the vocabulary contributes: Σ exp(s - max)·E, max and Σ exp(s - max), with s = scale·h·Wᵀ.

    Args:
        hidden: (rows, width).
        head: W, (tokens, width).
        table: E, (tokens, width); read only where it is not W.
        mixed_out: (parts, rows, width) float32.
        largest_out: (parts, rows) float32.
        total_out: (parts, rows) float32.
        rows: B.
        tokens: V.
        width: d.
        scale: Of the logits, 1/T included.
        tokens_a_part: A multiple of TOKENS; every part has at least one token.
        ROWS: Of a tile of hidden states.
        TOKENS: Of a tile of the vocabulary.
        WIDTH: d, rounded up to a power of two.
        TIED: Whether E is W.
        PRECISION: Of float32 products.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    h = tl.load(hidden + row[:, None] * width + column[None, :], mask=inside, other=0.0)  # (ROWS, WIDTH)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    first = part * tokens_a_part
    for start in range(first, tl.minimum(first + tokens_a_part, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < tokens
        place = token.to(tl.int64)[:, None] * width + column[None, :]  # a large vocabulary has more than 2^31 weights
        known = there[:, None] & (column[None, :] < width)
        w = tl.load(head + place, mask=known, other=0.0)  # (TOKENS, WIDTH)
        logits = tl.dot(h, tl.trans(w), input_precision=PRECISION) * scale
        logits = tl.where(there[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        shrink = tl.exp(largest - larger)
        weights = tl.exp(logits - larger[:, None])  # (ROWS, TOKENS)
        total = total * shrink + tl.sum(weights, 1)
        e = w
        if not TIED:
            e = tl.load(table + place, mask=known, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weights.to(e.dtype), e, input_precision=PRECISION)
        largest = larger
    out = part * rows + row
    tl.store(mixed_out + out.to(tl.int64)[:, None] * width + column[None, :], mixed, mask=inside)
    tl.store(largest_out + out, largest, mask=row < rows)
    tl.store(total_out + out, total, mask=row < rows)


@triton.jit
def soft_token_backward(
    hidden, head, table, grad, log_total, mean_grad, grad_out, rows, tokens, width, scale, tokens_a_part,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, TIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one part of the vocabulary contributes to the gradient of the hidden states; logits are computed again.

    With p = exp(s - log Σ exp(s)) and the gradient g of the soft token: ∂h = scale · [p ∘ (g·Eᵀ - p·(g·Eᵀ))] · W.

    Args:
        hidden: (rows, width), as are `head`, `table` and the sizes those of `soft_token_forward`.
        head: W.
        table: E.
        grad: g, (rows, width).
        log_total: log Σ exp(s), (rows,) float32.
        mean_grad: p·(g·Eᵀ), which is g·(p·E), (rows,) float32.
        grad_out: (parts, rows, width) float32.
        rows: B.
        tokens: V.
        width: d.
        scale: Of the logits.
        tokens_a_part: As above.
        ROWS: Of a tile of hidden states.
        TOKENS: Of a tile of the vocabulary.
        WIDTH: d, rounded up to a power of two.
        TIED: Whether E is W.
        PRECISION: Of float32 products.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    cells = row[:, None] * width + column[None, :]
    h = tl.load(hidden + cells, mask=inside, other=0.0)  # (ROWS, WIDTH)
    g = tl.load(grad + cells, mask=inside, other=0.0)
    offset = tl.load(log_total + row, mask=row < rows, other=0.0)
    mean = tl.load(mean_grad + row, mask=row < rows, other=0.0)
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    first = part * tokens_a_part
    for start in range(first, tl.minimum(first + tokens_a_part, tokens), TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < tokens
        place = token.to(tl.int64)[:, None] * width + column[None, :]
        known = there[:, None] & (column[None, :] < width)
        w = tl.load(head + place, mask=known, other=0.0)  # (TOKENS, WIDTH)
        logits = tl.dot(h, tl.trans(w), input_precision=PRECISION) * scale
        weights = tl.where(there[None, :], tl.exp(logits - offset[:, None]), 0.0)  # (ROWS, TOKENS)
        e = w
        if not TIED:
            e = tl.load(table + place, mask=known, other=0.0)
        slope = tl.dot(g, tl.trans(e), input_precision=PRECISION)
        change = weights * (slope - mean[:, None]) * scale
        found += tl.dot(change.to(w.dtype), w, input_precision=PRECISION)
    out = part * rows + row
    tl.store(grad_out + out.to(tl.int64)[:, None] * width + column[None, :], found, mask=inside)
