"""Triton kernels on maps of C channels, H rows and W columns: means along both axes, and one factor for each.

One program serves one sample, BC channels and BW columns, and goes down the rows. What is summed over the rows is
finished within it; what is summed over the columns only where they fit into BW, and `strips.py` adds up the rest.
For the rest see `map_kernels.py`.
"""

# mypy: ignore-errors
# no annotations from the future: Triton reads these itself

import triton
import triton.language as tl


@triton.jit
def pool(
    x, left, down, C, H, W, sb, sc, sh, sw, pc, ph, qc, qw, SC, SW, BC: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """x → Σ_w x, a part of it for each block of columns, and Σ_h x: (SW, B, C, H) and (B, C, W), float32."""
    job = tl.program_id(0).to(tl.int64)
    b, block = job // (SC * SW), job % SW
    c = ((job // SW) % SC).to(tl.int32) * BC + tl.arange(0, BC)
    w = block.to(tl.int32) * BW + tl.arange(0, BW)
    inside = (c < C)[:, None] & (w < W)[None, :]
    samples = tl.num_programs(0).to(tl.int64) // (SC * SW)
    total = tl.zeros([BC, BW], tl.float32)
    for h in range(0, H):
        at = b * sb + c[:, None] * sc + h * sh + w[None, :] * sw
        z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(left + (block * samples + b) * C * H + c * pc + h * ph, tl.sum(z, axis=1), mask=c < C)
        total += z
    tl.store(down + b * C * W + c[:, None] * qc + w[None, :] * qw, total, mask=inside)


@triton.jit
def products(
    g, x, p, q, left, down, C, H, W, sb, sc, sh, sw, pc, ph, qc, qw, SC, SW, BC: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """Σ_w g x q, a part for each block of columns, and Σ_h g x p, as `pool` writes them; p: (B, C, H), q: (B, C, W)."""
    job = tl.program_id(0).to(tl.int64)
    b, block = job // (SC * SW), job % SW
    c = ((job // SW) % SC).to(tl.int32) * BC + tl.arange(0, BC)
    w = block.to(tl.int32) * BW + tl.arange(0, BW)
    inside = (c < C)[:, None] & (w < W)[None, :]
    samples = tl.num_programs(0).to(tl.int64) // (SC * SW)
    at_q = b * C * W + c[:, None] * qc + w[None, :] * qw
    qv = tl.load(q + at_q, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BC, BW], tl.float32)
    for h in range(0, H):
        at = b * sb + c[:, None] * sc + h * sh + w[None, :] * sw
        z = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        z = z * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        at_p = c * pc + h * ph
        pv = tl.load(p + b * C * H + at_p, mask=c < C, other=0.0).to(tl.float32)
        tl.store(left + (block * samples + b) * C * H + at_p, tl.sum(z * qv, axis=1), mask=c < C)
        total += z * pv[:, None]
    tl.store(down + at_q, total, mask=inside)


@triton.jit
def scale(
    x, p, q, out, C, H, W, sb, sc, sh, sw, pc, ph, qc, qw, SC, SW, BC: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """out = x · p · q, rounded after each product."""
    job = tl.program_id(0).to(tl.int64)
    b = job // (SC * SW)
    c = ((job // SW) % SC).to(tl.int32) * BC + tl.arange(0, BC)
    w = (job % SW).to(tl.int32) * BW + tl.arange(0, BW)
    inside = (c < C)[:, None] & (w < W)[None, :]
    at_q = b * C * W + c[:, None] * qc + w[None, :] * qw
    qv = tl.load(q + at_q, mask=inside, other=0.0).to(tl.float32)
    for h in range(0, H):
        at = b * sb + c[:, None] * sc + h * sh + w[None, :] * sw
        y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        pv = tl.load(p + b * C * H + c * pc + h * ph, mask=c < C, other=0.0).to(tl.float32)
        y = (y * pv[:, None]).to(out.dtype.element_ty).to(tl.float32) * qv
        tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def ascend(
    g, p, q, left, down, out, C, H, W, sb, sc, sh, sw, pc, ph, qc, qw, SC, SW, BC: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """out = g p q + left + down; left: (B, C, H), down: (B, C, W), float32."""
    job = tl.program_id(0).to(tl.int64)
    b = job // (SC * SW)
    c = ((job // SW) % SC).to(tl.int32) * BC + tl.arange(0, BC)
    w = (job % SW).to(tl.int32) * BW + tl.arange(0, BW)
    inside = (c < C)[:, None] & (w < W)[None, :]
    at_q = b * C * W + c[:, None] * qc + w[None, :] * qw
    qv = tl.load(q + at_q, mask=inside, other=0.0).to(tl.float32)
    below = tl.load(down + at_q, mask=inside, other=0.0)
    for h in range(0, H):
        at = b * sb + c[:, None] * sc + h * sh + w[None, :] * sw
        y = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
        at_p = b * C * H + c * pc + h * ph
        pv = tl.load(p + at_p, mask=c < C, other=0.0).to(tl.float32)[:, None]
        beside = tl.load(left + at_p, mask=c < C, other=0.0)[:, None]
        tl.store(out + at, (y * pv * qv + beside + below).to(out.dtype.element_ty), mask=inside)
