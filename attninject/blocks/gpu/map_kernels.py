"""Triton kernels on maps of C channels and N positions: pooling, products of two maps, scaling, gradients.

One program serves one sample and BN positions, and goes over all channels, BC at a time. What is summed over the
channels is finished within it. What is summed over the positions it can only begin: it writes one number per
channel into a row of its own, and `maps.py` adds up the rows. So every map is read once, whatever is asked of it,
no order of additions is left to chance, and the rows are a few hundredths of the map.

A map's three strides tell where it lies; the one that is 1 is known to the compiler, which orders its loads by it.
All arithmetic is in float32; what the definition rounds on its way is rounded here to the same dtype. A pointer
that a flag leaves unused is any tensor. Offsets within a sample are 32 bits wide (`maps.py` refuses larger ones),
those of samples and rows 64.
"""

# mypy: ignore-errors
# ruff: noqa: SIM102, SIM108
# each flag has an `if` of its own, for the compiler; no annotations from the future: Triton reads these itself

import triton
import triton.language as tl


@triton.jit
def _rounded(z, like):
    """z, float32, as it is after a visit in the dtype that `like` points to."""
    return z.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _sigmoid(t):
    """σ(t), exactly 1/2 at 0, whatever division the card has."""
    return tl.where(t == 0.0, 0.5, 1.0 / (1.0 + tl.exp(-t)))


@triton.jit
def pool(
    x, m, w, row_sum, row_top, row_ties, mean, top, ties, mixed, C, N, sb, sc, sn, S,
    SCALED: tl.constexpr, SUM: tl.constexpr, TOP: tl.constexpr, ACROSS: tl.constexpr, MIX: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """z = x, or x · m (SCALED) → rows of its sums and maxima over positions; over channels mean, maximum, Σ w z."""
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    total, mix = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    best, count = tl.full([BN], -float("inf"), tl.float32), tl.zeros([BN], tl.float32)
    bad = tl.zeros([BN], tl.int32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        z = tl.load(x + b * sb + c[:, None] * sc + n[None, :] * sn, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            z = _rounded(z * tl.load(m + b * C + c, mask=c < C, other=0.0).to(tl.float32)[:, None], x)
            z = tl.where(inside, z, 0.0)  # 0 · ∞ beyond the edge
        if SUM:
            tl.store(row_sum + row * C + c, tl.sum(z, axis=1), mask=c < C)
        v = tl.where(inside & (z == z), z, -float("inf"))
        nan = (inside & (z != z)).to(tl.int32)
        if TOP:
            found = tl.max(v, axis=1)
            same = tl.sum((inside & (z == found[:, None])).to(tl.float32), axis=1)
            found = tl.where(tl.max(nan, axis=1) > 0, float("nan"), found)
            tl.store(row_top + row * C + c, found, mask=c < C)
            tl.store(row_ties + row * C + c, same, mask=c < C)
        if ACROSS:
            total += tl.sum(z, axis=0)
            found = tl.max(v, axis=0)
            same = tl.sum((inside & (z == found[None, :])).to(tl.float32), axis=0)
            higher = tl.maximum(best, found)
            count = tl.where(best == higher, count, 0.0) + tl.where(found == higher, same, 0.0)
            best = higher
            bad = tl.maximum(bad, tl.max(nan, axis=0))
        if MIX:
            mix += tl.sum(z * tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)[:, None], axis=0)
    if ACROSS:
        tl.store(mean + b * N + n, total / C, mask=n < N)
        tl.store(top + b * N + n, tl.where(bad > 0, float("nan"), best), mask=n < N)
        tl.store(ties + b * N + n, tl.where(bad > 0, 0.0, count), mask=n < N)
    if MIX:
        tl.store(mixed + b * N + n, mix, mask=n < N)


@triton.jit
def products(
    g, x, m, s, row_dot, row_sum, dot, C, N, sb, sc, sn, S,
    CHANNELS: tl.constexpr, WEIGHED: tl.constexpr, SUM: tl.constexpr, ACROSS: tl.constexpr, SCALED: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows of Σ_n s g x (s if WEIGHED) and Σ_n g, and Σ_c m g x (m if SCALED) of each position."""
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    weight = tl.full([BN], 1.0, tl.float32)
    if WEIGHED:
        weight = tl.load(s + b * N + n, mask=n < N, other=0.0).to(tl.float32)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        at = b * sb + c[:, None] * sc + n[None, :] * sn
        gv = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        p = gv * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if CHANNELS:
            tl.store(row_dot + row * C + c, tl.sum(p * weight[None, :], axis=1), mask=c < C)
        if SUM:
            tl.store(row_sum + row * C + c, tl.sum(gv, axis=1), mask=c < C)
        if ACROSS:
            if SCALED:
                p = p * tl.load(m + b * C + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
            total += tl.sum(p, axis=0)
    if ACROSS:
        tl.store(dot + b * N + n, total, mask=n < N)


@triton.jit
def descended(
    x, m, top, share, shift, row_dot, C, N, sb, sc, sn, S, BC: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Rows of Σ_n d x, d = shift + [x m = top] share: what descriptors over the channels of x · m send to m."""
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    best = tl.load(top + b * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    each = tl.load(share + b * N + n, mask=n < N, other=0.0)[None, :]
    base = tl.load(shift + b * N + n, mask=n < N, other=0.0)[None, :]
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        xv = tl.load(x + b * sb + c[:, None] * sc + n[None, :] * sn, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(m + b * C + c, mask=c < C, other=0.0).to(tl.float32)
        z = _rounded(xv * factor[:, None], x)
        d = base + (z == best).to(tl.float32) * each
        tl.store(row_dot + row * C + c, tl.sum(tl.where(inside, d * xv, 0.0), axis=1), mask=c < C)


@triton.jit
def scale(
    x, m, s, out, C, N, sb, sc, sn, S,
    SCALED: tl.constexpr, WEIGHED: tl.constexpr, SUMMED: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = x · m (SCALED), x · s (WEIGHED), x · m · s (both), or x · (m + s) (both, SUMMED)."""
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    weight = tl.full([BN], 1.0, tl.float32)
    if WEIGHED:
        weight = tl.load(s + b * N + n, mask=n < N, other=0.0).to(tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        at = b * sb + c[:, None] * sc + n[None, :] * sn
        y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            factor = tl.load(m + b * C + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
            if SUMMED:
                y = y * _rounded(factor + weight[None, :], x)
            else:
                y = _rounded(y * factor, x)
        if WEIGHED:
            if not SUMMED:
                y = y * weight[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def ascend(
    g, x, m, s, top, share, shift, peak, part, base, out, C, N, sb, sc, sn, S,
    SCALED: tl.constexpr, WEIGHED: tl.constexpr, ACROSS: tl.constexpr, SHIFTED: tl.constexpr, PEAKED: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of pooled maps: out = m · d + base + [x = peak] part, d = g s + shift + [x m = top] share.

    `m`, `base`, `peak`, `part`: per channel, `s`, `top`, `share`, `shift`: per position; each as far as its flag says.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    at_n, real = b * N + n, n < N
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        at_c, known = b * C + c, c < C
        inside = known[:, None] & real[None, :]
        at = b * sb + c[:, None] * sc + n[None, :] * sn
        d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if ACROSS or PEAKED:
            xv = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            factor = tl.load(m + at_c, mask=known, other=0.0).to(tl.float32)[:, None]
        if WEIGHED:
            d = d * tl.load(s + at_n, mask=real, other=0.0).to(tl.float32)[None, :]
        if ACROSS:
            z = xv
            if SCALED:
                z = _rounded(xv * factor, x)
            best = tl.load(top + at_n, mask=real, other=0.0).to(tl.float32)[None, :]
            d += (z == best).to(tl.float32) * tl.load(share + at_n, mask=real, other=0.0)[None, :]
            d += tl.load(shift + at_n, mask=real, other=0.0)[None, :]
        if SCALED:
            d = d * factor
        if SHIFTED:
            d += tl.load(base + at_c, mask=known, other=0.0)[:, None]
        if PEAKED:
            best = tl.load(peak + at_c, mask=known, other=0.0).to(tl.float32)[:, None]
            d += (xv == best).to(tl.float32) * tl.load(part + at_c, mask=known, other=0.0)[:, None]
        tl.store(out + at, d.to(out.dtype.element_ty), mask=inside)


@triton.jit
def outer(
    g, f, s, base, u, v, w, r, out, C, N, sb, sc, sn, S,
    SCALED: tl.constexpr, WEIGHED: tl.constexpr, SHIFTED: tl.constexpr, SECOND: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = g · (f + s) + base + u vᵀ + w rᵀ; f, base, u: (B, C), w: (C,), s, v, r: (B, N), each by its flag."""
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    at_n, real = b * N + n, n < N
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        at_c, known = b * C + c, c < C
        inside = known[:, None] & real[None, :]
        at = b * sb + c[:, None] * sc + n[None, :] * sn
        d = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            factor = tl.load(f + at_c, mask=known, other=0.0).to(tl.float32)[:, None]
            if WEIGHED:
                factor = factor + tl.load(s + at_n, mask=real, other=0.0).to(tl.float32)[None, :]
            d = d * factor
        if SHIFTED:
            d += tl.load(base + at_c, mask=known, other=0.0)[:, None]
        left = tl.load(w + c, mask=known, other=0.0).to(tl.float32)[:, None]
        d += left * tl.load(r + at_n, mask=real, other=0.0).to(tl.float32)[None, :]
        if SECOND:
            left = tl.load(u + at_c, mask=known, other=0.0).to(tl.float32)[:, None]
            d += left * tl.load(v + at_n, mask=real, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, d.to(out.dtype.element_ty), mask=inside)


@triton.jit
def modulate(
    g, x, p, s, out, row_dot, dot, constant, slope, C, N, sb, sc, sn, S,
    PRODUCT: tl.constexpr, BACKWARD: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = g · F, F = constant + slope σ(t), t = p s (PRODUCT) or p + s; p: (B, C), s: (B, N).

    BACKWARD: with ∂t = g x slope σ (1 − σ) also rows of Σ_n ∂t ∂t/∂p, and Σ_c ∂t ∂t/∂s of each position.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    sv = tl.load(s + b * N + n, mask=n < N, other=0.0)[None, :]
    total = tl.zeros([BN], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        at = b * sb + c[:, None] * sc + n[None, :] * sn
        pv = tl.load(p + b * C + c, mask=c < C, other=0.0)[:, None]
        gv = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        if PRODUCT:
            sigma = _sigmoid(pv * sv)
        else:
            sigma = _sigmoid(pv + sv)
        y = gv * _rounded(constant + slope * sigma, out)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
        if BACKWARD:
            d = gv * tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * (slope * sigma * (1.0 - sigma))
            d = tl.where(inside, d, 0.0)
            if PRODUCT:
                tl.store(row_dot + row * C + c, tl.sum(d * sv, axis=1), mask=c < C)
                total += tl.sum(d * pv, axis=0)
            else:
                tl.store(row_dot + row * C + c, tl.sum(d, axis=1), mask=c < C)
                total += tl.sum(d, axis=0)
    if BACKWARD:
        tl.store(dot + b * N + n, total, mask=n < N)


@triton.jit
def gather(
    x, w, logits, row_top, row_total, row_sum, C, N, sb, sc, sn, S, BC: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """l_n = Σ_c w_c x_cn, and of each row its largest l, t, and Σ_n exp(l − t) and Σ_n exp(l − t) x.

    The channels are gone over twice; what a program reads again, a hundred positions, should still lie in the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    logit = tl.zeros([BN], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        z = tl.load(x + b * sb + c[:, None] * sc + n[None, :] * sn, mask=inside, other=0.0).to(tl.float32)
        logit += tl.sum(z * tl.load(w + c, mask=c < C, other=0.0).to(tl.float32)[:, None], axis=0)
    tl.store(logits + b * N + n, logit, mask=n < N)
    logit = tl.where(n < N, logit, -float("inf"))
    top = tl.max(logit, axis=0)
    weight = tl.exp(logit - tl.where(top == -float("inf"), 0.0, top))
    tl.store(row_top + row, top)
    tl.store(row_total + row, tl.sum(weight, axis=0))
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        z = tl.load(x + b * sb + c[:, None] * sc + n[None, :] * sn, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            row_sum + row * C + c, tl.sum(tl.where(inside, z * weight[None, :], 0.0), axis=1), mask=c < C
        )


@triton.jit
def gather_back(
    x, ds, a, da, row_dot, C, N, sb, sc, sn, S, BC: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """∂a_n = Σ_c ∂s_c x_cn, and rows of Σ_n a ∂a x; ds: (B, C), a: (B, N)."""
    row = tl.program_id(0).to(tl.int64)
    b = row // S
    n = (row % S).to(tl.int32) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        z = tl.load(x + b * sb + c[:, None] * sc + n[None, :] * sn, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(z * tl.load(ds + b * C + c, mask=c < C, other=0.0)[:, None], axis=0)
    tl.store(da + b * N + n, total, mask=n < N)
    weight = total * tl.load(a + b * N + n, mask=n < N, other=0.0)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (n < N)[None, :]
        z = tl.load(x + b * sb + c[:, None] * sc + n[None, :] * sn, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            row_dot + row * C + c, tl.sum(tl.where(inside, z * weight[None, :], 0.0), axis=1), mask=c < C
        )
