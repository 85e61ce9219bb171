"""Attention on the CPU: ATen's flash kernels where they apply, our own blocks of queries where dropout is wanted.

scaled_dot_product_attention is several times as fast as the plain form, but has no counter-based dropout, gives no lse
and aligns a causal mask to the top left. The operators here fill these gaps on the same flash kernels: grouped queries
without copies of k and v, lse with a gradient, masks aligned to the bottom right. With dropout they hold one block of
scores at a time, draw only that part of the mask that is seen, and keep one byte a score for the backward.

B batch, H heads, Hkv key heads, T queries, S keys, D head dim.
"""

import math

import torch
import torch.nn.functional as F

from heiretsu.kernels.arguments import attention_options, checked, own_dtypes, reverse_mode_only
from heiretsu.kernels.cpu.random import BlockPhilox
from heiretsu.kernels.dtypes import at_least_float32
from heiretsu.kernels.random import Dropout

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

BLOCK_SCORES = 65536  # scores in a block under dropout: at eight bytes a counter, a few blocks fit in the L2 cache
# The longest sequence whose 16-bit gradients ATen's flash backward takes in 16 bits. It adds up blocks of 32 to 256
# queries in dk and dv, and of keys in dq, in their dtype: after 4 blocks the error is plain's, after 12 (767 queries)
# it breaks the parity rule, at 4096 it is four times plain's. In float32 it takes 1.13 to 1.25 times as long.
EXACT_LENGTH = 256


@checked
def attention(q, k, v, causal=True, scale=None, dropout_p=0.0, seed=0, offsets=(0, 0)):
    """`plain.attention` on the CPU."""
    reverse_mode_only("attention", q, k, v)
    square, short = q.shape[:3] == k.shape[:3], q.itemsize == 2 and q.shape[2] <= EXACT_LENGTH
    if square and short and dropout_p == 0.0 and scale != 0.0 and q.numel() > 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return _outputs(q, k, v, causal, scale, dropout_p, seed, offsets)[0]


@checked
def attention_lse(q, k, v, causal=True, scale=None, dropout_p=0.0, seed=0, offsets=(0, 0)):
    """`plain.attention_lse` on the CPU."""
    reverse_mode_only("attention", q, k, v)
    return _outputs(q, k, v, causal, scale, dropout_p, seed, offsets)[:2]


def _outputs(q, k, v, causal, scale, dropout_p, seed, offsets):
    if scale == 0.0:  # by which ATen multiplies the -inf of its causal mask
        q, scale = q * 0.0, 1.0
    return _attention(q, k, v, *attention_options(q, causal, scale, dropout_p, seed, offsets))


@torch.library.custom_op("heiretsu::attention_cpu", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, dropout_p: float, seed: int,
    batch_offset: int, head_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """out (B, H, T, D), lse (B, H, T) and the keep mask (B, H, T, S), empty without dropout."""
    out, lse, keep = _attention_fake(q, k, v, causal, scale, dropout_p, seed, batch_offset, head_offset)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf), keep
    dropout = Dropout.of(dropout_p, seed, batch_offset, head_offset)
    q, k, v = map(_unit_stride, (q, k, v))
    blind = _blind_rows(q, k, causal)
    out[:, :, :blind], lse[:, :, :blind] = 0.0, -torch.inf
    if dropout_p > 0.0:
        keep[:, :, :blind] = False
    for heads in _groups(q, k):
        q_, out_, lse_ = (t[:, heads, blind:] for t in (q, out, lse))
        if dropout_p == 0.0:
            is_causal, mask = _flash_mask(q_, k, causal)
            o, l_ = _flash(q_, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
            out_.copy_(o), lse_.copy_(l_)
        else:
            _forward_blocks(q_, k, v, out_, lse_, keep[:, heads, blind:], causal, scale, dropout, heads, blind)
    return out, lse, keep


@_attention.register_fake
def _attention_fake(q, k, v, causal, scale, dropout_p, seed, batch_offset, head_offset):
    B, H, T, D = q.shape
    lse = q.new_empty(B, H, T, dtype=at_least_float32(q.dtype))
    keep = q.new_empty((B, H, T, k.shape[2]) if dropout_p > 0.0 else 0, dtype=torch.bool)
    return q.new_empty(B, T, H, D).transpose(1, 2), lse, keep


@torch.library.custom_op("heiretsu::attention_cpu_backward", mutates_args=())
@own_dtypes
def _attention_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, keep: torch.Tensor, causal: bool, scale: float, dropout_p: float,
    need_dq: bool, need_dkdv: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv; an empty tensor for one that is not needed."""
    needs = (need_dq, need_dkdv)
    dq, dk, dv = _attention_backward_fake(dout, dlse, q, k, v, out, lse, keep, causal, scale, dropout_p, *needs)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    dout, q, k, v = map(_unit_stride, (dout, q, k, v))
    blind = _blind_rows(q, k, causal)
    wide = at_least_float32(q.dtype)
    if q.dtype == wide and q.shape[1] == k.shape[1] and blind == 0 and dlse is None and dropout_p == 0.0:
        dq, dk, dv = _flash_gradients(dout, dlse, q, k, v, out, lse, causal, scale)  # nothing to add up
        dq = dq if need_dq else q.new_empty(0)
        return (dq, dk, dv) if need_dkdv else (dq, q.new_empty(0), q.new_empty(0))
    sums = [t.new_zeros(t.shape, dtype=wide) if need else None for t, need in ((q, need_dq), *[(k, need_dkdv)] * 2)]
    for heads in _groups(q, k):
        dout_, q_, out_, lse_ = (t[:, heads, blind:] for t in (dout, q, out, lse))
        dlse_ = None if dlse is None else dlse[:, heads, blind:]
        sums_ = (sums[0][:, heads, blind:] if need_dq else None, *sums[1:])
        if dropout_p == 0.0:
            grads = _flash_gradients(dout_, dlse_, q_, k, v, out_, lse_, causal, scale)
            for total, grad in zip(sums_, grads, strict=True):
                if total is not None:
                    total += grad
        else:
            keep_ = keep[:, heads, blind:]
            _backward_blocks(dout_, dlse_, q_, k, v, lse_, keep_, causal, scale, dropout_p, *sums_)
    for gradient, total in zip((dq, dk, dv), sums, strict=True):
        if total is not None:
            gradient.copy_(total)
    return dq, dk, dv


@_attention_backward.register_fake
def _attention_backward_fake(dout, dlse, q, k, v, out, lse, keep, causal, scale, dropout_p, need_dq, need_dkdv):
    def gradient(t, needed):
        B, H, length, D = t.shape
        return t.new_empty(B, length, H, D).transpose(1, 2) if needed else t.new_empty(0)

    return gradient(q, need_dq), gradient(k, need_dkdv), gradient(v, need_dkdv)


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.scale, ctx.dropout_p, *_ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse, _):
    q, k, v, out, lse, keep = ctx.saved_tensors
    dout = q.new_zeros(()).expand_as(q) if dout is None else dout
    needs = need_q, need_k, need_v = ctx.needs_input_grad[:3]
    options = (ctx.causal, ctx.scale, ctx.dropout_p, need_q, need_k or need_v)
    grads = _attention_backward(dout, dlse, q, k, v, out, lse, keep, *options)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 6)


_attention.register_autograd(_differentiate, setup_context=_setup_context)


def _unit_stride(t):
    """ATen's flash kernels read rows whose elements are not neighbours as if they were, without a word."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _blind_rows(q, k, causal) -> int:
    """Number of first queries that see no key."""
    return max(0, q.shape[2] - k.shape[2]) if causal else 0


def _groups(q, k) -> list[slice]:
    """Slices of the query heads, each with one head for every key head."""
    group = q.shape[1] // k.shape[1]
    return [slice(g, None, group) for g in range(group)]


def _flash_mask(q, k, causal):
    """is_causal and attn_mask of ATen's flash kernel, whose own causal mask is aligned to the top left."""
    T, S = q.shape[2], k.shape[2]
    if not causal or T == S:
        return causal, None
    hidden = q.new_ones(T, S, dtype=torch.bool).triu(S - T + 1)
    return False, q.new_zeros(T, S).masked_fill_(hidden, -torch.inf)


def _flash_gradients(dout, dlse, q, k, v, out, lse, causal, scale):
    """dq, dk, dv of ATen's flash backward, and of `_add_row_gradients` for the rows that it gets wrong.

    There is none for lse: it computes ds = p (dout v^T - rowsum(dout out)). A column dlse appended to dout, 1 to v and
    0 to out makes that p (dout v^T + dlse - rowsum(dout out)). Two such columns hold a float32 dlse beside 16-bit
    operands.
    """
    D = q.shape[3]
    operands = dout, dlse, q, k, v
    hot = _one_hot_rows(q, k, v, out, lse, causal, scale) if q.itemsize > 2 else None
    if hot is not None:
        lse = lse.masked_fill(hot, torch.inf)  # p = 0 and ds = 0
    if dlse is not None:
        high = dlse.to(q.dtype)
        rest = (dlse - high).to(q.dtype)
        dout = torch.cat([dout, high[..., None], rest[..., None]], -1)
        v = F.pad(v, (0, 2), value=1.0)
        q, k, out = (F.pad(t, (0, 2)) for t in (q, k, out))
    if q.itemsize == 2 and max(q.shape[2], k.shape[2]) > EXACT_LENGTH:
        dout, q, k, v, out = (t.float() for t in (dout, q, k, v, out))
    is_causal, mask = _flash_mask(q, k, causal)
    grads = _flash_backward(dout, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
    grads = [grad[..., :D] for grad in grads]
    if hot is not None:
        _add_row_gradients(hot, *operands, causal, scale, *grads)
    return grads


def _one_hot_rows(q, k, v, out, lse, causal, scale):
    """Mask (B, H, T) of all rows where one key's probability rounds to 1, and some others; None where there are none.

    In such a row ds should be 0, and ATen's is what two orders of the sum in dp and delta differ by: some ulps of
    |dout| |v|, which scores of 1e4 make visible in dq and dk. Of any four keys that it sees, three must be far below
    its lse, which costs a hundredth of the backward to ask; and its out must be a row of v, of which the sums tell. A
    causal first row has one key whatever its score: it is left to ATen unless the score is large.
    """
    T, S = q.shape[2], k.shape[2]
    if S == 1:
        return torch.ones_like(lse, dtype=torch.bool)
    eps = torch.finfo(q.dtype).eps
    far = -math.log(eps)
    s = F.pad((q @ k[:, :, :4].mT).mul_(scale), (0, max(0, 4 - S)), value=-torch.inf)
    if causal:
        s.masked_fill_(s.new_ones(T, 4, dtype=torch.bool).triu_(S - T + 1), -torch.inf)
    low, high = s.unflatten(-1, (2, 2)).aminmax(dim=-1)
    second = torch.maximum(low.amax(-1), high.amin(-1))  # the second largest of the four
    hot = lse - second > far
    if causal and T == S:
        hot[:, :, 0] = lse[:, :, 0].abs() > far
    if not hot.any():
        return None
    sums, known = out.sum(-1), v.sum(-1).sort(-1).values
    near = 4 * eps * v.abs().sum(-1).amax()
    hot &= torch.searchsorted(known, sums + near, right=True) > torch.searchsorted(known, sums - near)
    return hot if hot.any() else None


def _add_row_gradients(hot, dout, dlse, q, k, v, causal, scale, dq, dk, dv):
    """Add what the rows of the mask `hot` give, computed as plain does."""
    S, shift = k.shape[2], k.shape[2] - q.shape[2]
    for b, h in hot.any(-1).nonzero().tolist():
        for rows in hot[b, h].nonzero()[:, 0].split(max(16, BLOCK_SCORES // S)):
            keys = slice(0, int(rows[-1]) + shift + 1 if causal else S)
            q_, k_, v_, dout_ = q[b, h, rows], k[b, h, keys], v[b, h, keys], dout[b, h, rows]
            s = (q_ @ k_.T).mul_(scale)
            if causal:
                s.masked_fill_(torch.arange(keys.stop, device="cpu") > rows[:, None] + shift, -torch.inf)
            p = s.softmax(-1)
            ds = dout_ @ v_.T
            ds -= (p * ds).sum(-1, keepdim=True)
            if dlse is not None:
                ds += dlse[b, h, rows, None]
            ds.mul_(p).mul_(scale)
            dq[b, h, rows] += ds @ k_
            dk[b, h, keys] += ds.T @ q_
            dv[b, h, keys] += p.T @ dout_


def _blocks(q, k, causal):
    """(batch, head, rows, keys) of each block of scores: queries of one head and the keys that any of them sees."""
    B, H, T, _ = q.shape
    S = k.shape[2]
    step = max(16, BLOCK_SCORES // S)
    for b in range(B):
        for h in range(H):
            for first in range(0, T, step):
                last = min(T, first + step)
                yield b, h, slice(first, last), slice(0, last + S - T if causal else S)


def _scores(q, k, rows, keys, causal, scale, shift):
    """Scores of a block in float32 at least, hidden ones -inf."""
    s = (q[rows] @ k[keys].T).to(at_least_float32(q.dtype)).mul_(scale)
    if causal:
        hidden = s.new_ones(s.shape, dtype=torch.bool).triu_(rows.start + shift + 1)
        s.masked_fill_(hidden, -torch.inf)
    return s


def _forward_blocks(q, k, v, out, lse, keep, causal, scale, dropout, heads, blind):
    """Fill out, lse and keep, which are views with q's heads and rows."""
    philox = BlockPhilox(max(BLOCK_SCORES, 16 * k.shape[2]))
    shift = k.shape[2] - q.shape[2]
    for b, h, rows, keys in _blocks(q, k, causal):
        s = _scores(q[b, h], k[b, h], rows, keys, causal, scale, shift)
        row_lse = s.logsumexp(-1)
        lse[b, h, rows] = row_lse
        head = heads.start + h * heads.step + dropout.head_offset
        queries = torch.arange(blind + rows.start, blind + rows.stop, device="cpu")
        bits = philox.draw(dropout.seed, queries, torch.arange(keys.stop, device="cpu"), head, b + dropout.batch_offset)
        kept = torch.ge(bits, dropout.drop_below, out=keep[b, h, rows, keys])
        keep[b, h, rows, keys.stop :] = False  # drawn for nobody, but an operator's output all the same
        p = s.sub_(row_lse[:, None]).exp_().mul_(kept)
        torch.mm(p.to(v.dtype), v[b, h, keys], out=out[b, h, rows]).mul_(dropout.keep_scale)


def _backward_blocks(dout, dlse, q, k, v, lse, keep, causal, scale, dropout_p, dq, dk, dv):
    """Add to dq, dk and dv, in the order of the blocks; None for those that are not needed."""
    shift = k.shape[2] - q.shape[2]
    keep_scale = 1.0 / (1.0 - dropout_p)
    for b, h, rows, keys in _blocks(q, k, causal):
        p = _scores(q[b, h], k[b, h], rows, keys, causal, scale, shift).sub_(lse[b, h, rows, None]).exp_()
        kept, do = keep[b, h, rows, keys], dout[b, h, rows]
        dp = (do @ v[b, h, keys].T).to(p.dtype).mul_(kept).mul_(keep_scale)
        delta = (p * dp).sum(-1, keepdim=True)  # the whole row is here: no need for the rounded out
        if dlse is not None:
            delta -= dlse[b, h, rows, None]
        ds = dp.sub_(delta).mul_(p).mul_(scale).to(q.dtype)
        if dq is not None:
            dq[b, h, rows] += ds @ k[b, h, keys]
        if dk is not None:
            dk[b, h, keys] += ds.T @ q[b, h, rows]
            dv[b, h, keys] += (p.mul_(kept).mul_(keep_scale).to(do.dtype)).T @ do
