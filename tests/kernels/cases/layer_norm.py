"""Parity cases and planted bugs of layer_norm.

In the interpreter a tile is 4 whole rows, and a backward program takes two of them, one after the other.
"""

import torch

from tests.kernels.parity import Case, Mutation


def _inputs(*shape, residual=True, parameters=None, mean=0.0, spread=1.0, eps=None, grad="xwbr"):
    """parameters: their dtype, x's by default. grad: initials of the inputs that require a gradient."""

    def inputs(generator, dtype):
        C = shape[-1]
        values = {
            "x": (torch.randn(shape, generator=generator) * spread + mean).to(dtype),
            "weight": (torch.randn(C, generator=generator) + 1.0).to(parameters or dtype),
            "bias": torch.randn(C, generator=generator).to(parameters or dtype),
        }
        if residual:
            values["residual"] = torch.randn(shape, generator=generator).to(dtype)
        values = {name: t.requires_grad_(name[0] in grad) for name, t in values.items()}
        return values if eps is None else values | {"eps": eps}

    return inputs


def _mixed(x, residual):
    """x and the residual in dtypes of their own, beside float32 parameters; None: the row's."""

    def inputs(generator, dtype):
        values = _inputs(5, 70, parameters=torch.float32)(generator, dtype)
        own = {"x": x or dtype, "residual": residual or dtype}
        return values | {name: values[name].detach().to(own[name]).requires_grad_() for name in own}

    return inputs


def _views(generator, dtype):
    fused = torch.randn(9, 120, generator=generator).to(dtype)
    parameters = (torch.randn(80, generator=generator) + 1.0).to(dtype)
    return {
        "x": fused[:, :40].requires_grad_(),
        "weight": parameters[::2].requires_grad_(),
        "bias": parameters[1::2].requires_grad_(),
        "residual": fused.clone()[:, 80:].requires_grad_(),
    }


def _transposed(generator, dtype):
    x = torch.randn(33, 5, 3, generator=generator).to(dtype).permute(1, 2, 0)
    weight, bias = (torch.randn(2, 33, generator=generator) + 1.0).to(dtype).unbind()
    residual = torch.randn(1, 1, 33, generator=generator).to(dtype).expand(5, 3, 33)
    return {"x": x.requires_grad_(), "weight": weight.clone(), "bias": bias.clone(), "residual": residual}


CASES = [
    Case("layer_norm", "one channel", "variance 0: rstd is 1 / sqrt(eps)", _inputs(9, 1, residual=False)),
    Case("layer_norm", "one row", "a single token", _inputs(1, 65)),
    Case("layer_norm", "whole tiles", "no tail anywhere", _inputs(8, 32, residual=False), emulate=True),
    Case(
        "layer_norm", "with residual", "the sum is normalised, stored, and has a gradient", _inputs(4, 64), emulate=True
    ),
    Case("layer_norm", "tails", "17 rows of 63: one behind a backward block", _inputs(17, 63, residual=False)),
    Case("layer_norm", "tails with residual", "3 x 5 rows of 65", _inputs(3, 5, 65)),
    Case("layer_norm", "float32 parameters", "mixed precision", _inputs(20, 96, parameters=torch.float32)),
    Case(
        "layer_norm",
        "far from zero",
        "mean 100 times the spread: the variance is taken about it",
        _inputs(10, 127, residual=False, mean=100.0),
    ),
    Case("layer_norm", "tiny values", "eps decides", _inputs(10, 70, residual=False, spread=1e-3)),
    Case("layer_norm", "large eps", "eps is not the default", _inputs(10, 70, eps=0.5)),
    Case("layer_norm", "wide rows", "1000 channels in one tile", _inputs(5, 1000)),
    Case(
        "layer_norm",
        "float32 stream",
        "16-bit branches into a float32 residual: y narrow, the sum wide, each gradient in its input's dtype",
        _mixed(None, torch.float32),
        (torch.bfloat16, torch.float16),
    ),
    Case(
        "layer_norm",
        "narrow residual",
        "a bfloat16 residual under a wider branch: sum in float32",
        _mixed(None, torch.bfloat16),
        (torch.float32, torch.float16),
    ),
    Case("layer_norm", "views", "slices of a fused projection, strided parameters", _views),
    Case("layer_norm", "transposed", "channels that are not contiguous; an expanded residual", _transposed),
    Case("layer_norm", "only x", "frozen parameters", _inputs(9, 33, grad="x")),
    Case("layer_norm", "only parameters", "x from a frozen layer", _inputs(9, 33, grad="wb")),
    Case("layer_norm", "only residual", "the residual stream alone", _inputs(9, 33, grad="r")),
    Case("layer_norm", "only y used", "no gradient comes into the sum", _inputs(9, 33), backward=("y",)),
    Case("layer_norm", "only the sum used", "no gradient comes into y", _inputs(9, 33), backward=("total",)),
    Case("layer_norm", "no grad", "inference", _inputs(9, 33, grad="")),
    Case("layer_norm", "no rows", "an empty batch", _inputs(0, 33)),
]

MUTATIONS = [
    Mutation("eps dropped", "/ C + EPS)", "/ C)", "tiny values", "layer_norm.py"),
    Mutation(
        "mean not subtracted from the variance",
        "tl.sum(centred * centred, 1) / C",
        "tl.sum(x * x, 1) / C",
        "with residual",
        "layer_norm.py",
    ),
    Mutation(
        "padding counted in the variance",
        "tl.where((cols < C)[None, :], x - mean[:, None], 0.0)",
        "x - mean[:, None]",
        "tails",
        "layer_norm.py",
    ),
    Mutation(
        "mean over the padded width",
        "mean = tl.sum(x, 1) / C",
        "mean = tl.sum(x, 1) / BLOCK_C",
        "tails",
        "layer_norm.py",
    ),
    Mutation(
        "rstd not applied", "(x - mean[:, None]) * rstd[:, None]", "(x - mean[:, None])", "whole tiles", "layer_norm.py"
    ),
    Mutation(
        "variance instead of standard deviation",
        "1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS)",
        "1.0 / (tl.sum(centred * centred, 1) / C + EPS)",
        "whole tiles",
        "layer_norm.py",
    ),
    Mutation("dx without the mean of wdy", "wdy - tl.sum(wdy, 1)[:, None] / C", "wdy", "whole tiles", "layer_norm.py"),
    Mutation("dx without the part along xhat", "- xhat * along[:, None]", "", "whole tiles", "layer_norm.py"),
    Mutation(
        "weight forgotten in dx",
        "wdy = weight[None, :] * dy",
        "wdy = dy + 0.0 * weight[None, :]",
        "whole tiles",
        "layer_norm.py",
    ),
    Mutation(
        "gradient of the sum dropped",
        "if ADD:\n            dx += load_tile(dtotal_ptr",
        "if False:\n            dx += load_tile(dtotal_ptr",
        "with residual",
        "layer_norm.py",
    ),
    Mutation(
        "sum not rounded as it is stored",
        "x = widen(x.to(total_ptr.dtype.element_ty))",
        "x = widen(x * 1.01)",
        "with residual",
        "layer_norm.py",
    ),
    Mutation("dweight of the last tile alone", "dweight += dy * xhat", "dweight = dy * xhat", "tails", "layer_norm.py"),
    Mutation(
        "dbias race: all programs write one row",
        "dbias_ptr + program * C + cols",
        "dbias_ptr + cols",
        "tails",
        "layer_norm.py",
    ),
    Mutation(
        "stride of the residual",
        "load_tile(residual_ptr, rows, stride_residual",
        "load_tile(residual_ptr, rows, stride_x",
        "transposed",
        "layer_norm.py",
    ),
]
