"""GroupNorm and ReLU as one operation, filters standardised straight into the convolution's precision: on a CPU by the C++ of
fused.cpp, built at first use; on a GPU by what torch.compile makes of the eager forms.

Where neither can be had (no g++, another device) the eager form stays. Only the input and two figures per group are kept for
backward. Results differ from the eager form by rounding, as between micro-batches; `fused: false` keeps to the eager form.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.models.resnet import EPS, GroupNormReLU, StdConv2d, group_norm_relu, standardize

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-std=c++17", "-fPIC", "-shared")
SHAPES = 512  # of one function's tensors, over all layers, batch sizes and precisions
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def compiler() -> str | None:
    """The C++ compiler: CXX, or g++ where it is installed."""
    return os.environ.get("CXX") or shutil.which("g++")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled fused.cpp, from the user's cache where it lies there; None, with a warning, where it cannot be built."""
    if not (found := compiler()):
        warnings.warn("no g++ here: GroupNorm and ReLU run unfused. Install g++ or set CXX.", stacklevel=2)
        return None
    processor = Path("/proc/cpuinfo").read_text().split("\n\n")[0] if Path("/proc/cpuinfo").is_file() else ""
    flags = [line for line in processor.splitlines() if line.startswith(("flags", "Features", "model name"))]
    key = hashlib.sha256(
        "\n".join([SOURCE.read_text(), *FLAGS, found, platform.machine(), *flags]).encode()
    ).hexdigest()
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bit", f"fused-{key[:16]}.so")
    if not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cached.parent) as folder:
                built = Path(folder, cached.name)
                subprocess.run(
                    [found, *FLAGS, str(SOURCE), "-o", str(built)], check=True, capture_output=True, text=True
                )
                built.replace(cached)  # whole or not there: several ranks may build at once
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            warnings.warn(f"GroupNorm and ReLU run unfused, the build failed: {reason}", stacklevel=2)
            return None
    return ctypes.CDLL(str(cached))


class _GroupNormReLU(torch.autograd.Function):
    """[N, C, H, W] fp32 or bf16 → the same; gamma and beta [C] fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        mean, rstd = (torch.empty(len(x), groups) for _ in range(2))
        _call("forward", x, gamma, beta, y, mean, rstd, *_sizes(x, groups), ctypes.c_double(eps))
        ctx.save_for_backward(x, gamma, beta, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, mean, rstd = ctx.saved_tensors
        dy = dy.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dgamma, dbeta = (torch.empty(len(x), x.shape[1]) for _ in range(2))
        _call("backward", dy, x, gamma, beta, mean, rstd, dx, dgamma, dbeta, *_sizes(x, ctx.groups))
        return dx, dgamma.sum(0), dbeta.sum(0), None, None


class _Standardize(torch.autograd.Function):
    """fp32 weights [O, I, kh, kw] in channels_last → the same, standardised, as `dtype`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty_like(weight, dtype=dtype)
        mean, rstd = torch.empty(len(weight)), torch.empty(len(weight))
        sizes = [ctypes.c_int64(len(weight)), ctypes.c_int64(weight[0].numel())]
        _call("standardize", out, weight, mean, rstd, *sizes, ctypes.c_double(EPS))
        ctx.save_for_backward(weight, mean, rstd)
        ctx.sizes = sizes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        weight, mean, rstd = ctx.saved_tensors
        up = up.contiguous(memory_format=torch.channels_last)
        gradient = torch.empty_like(weight)
        _call("standardize_backward", up, weight, mean, rstd, gradient, *ctx.sizes)
        return gradient, None


def standardize_on_cpu(weight: Tensor) -> Tensor:
    """`standardize` by the C++ library, which must be there; under autocast in its precision."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if dtype not in NAMES or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return standardize(weight)
    return _Standardize.apply(weight.contiguous(memory_format=torch.channels_last), dtype)


def _sizes(x: Tensor, groups: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in (len(x), x.shape[2] * x.shape[3], x.shape[1], groups)]


def _call(direction: str, *arguments: Any) -> None:
    """`direction` of the library on tensors and sizes; the first tensor's type chooses the function."""
    function = getattr(library(), f"{direction}_{NAMES[arguments[0].dtype]}")
    values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    function(*values, ctypes.c_int(torch.get_num_threads()))


def on_cpu(x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float) -> Tensor:
    """`group_norm_relu` by the C++ library, which must be there; by the eager form for other types."""
    if x.dtype not in NAMES or gamma.dtype != torch.float32 or x.device.type != "cpu":
        return group_norm_relu(x, gamma, beta, groups, eps)
    return _GroupNormReLU.apply(x, gamma.contiguous(), beta.contiguous(), groups, eps)


def kernels(device: torch.device) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """The fastest forms of `group_norm_relu` and `standardize` for a device."""
    if device.type == "cpu" and library() is not None:
        return on_cpu, standardize_on_cpu
    if device.type == "cuda":
        _compile_every_shape()
        return torch.compile(group_norm_relu, dynamic=False), torch.compile(standardize, dynamic=False)
    return group_norm_relu, standardize


def _compile_every_shape() -> None:
    """Dynamo gives up on a function after 8 shapes and runs it eagerly: a network has dozens, in training and evaluation."""
    limits = import_module("torch._dynamo").config
    limits.recompile_limit = max(SHAPES, limits.recompile_limit)
    limits.accumulated_recompile_limit = max(4 * SHAPES, limits.accumulated_recompile_limit)


def fuse(model: torch.nn.Module, device: torch.device) -> None:
    """Lets every GroupNorm-ReLU and every standardisation of a network run by the fused forms for `device`."""
    norm, filters = kernels(device)
    for module in model.modules():
        if isinstance(module, GroupNormReLU):
            module.kernel = norm
        elif isinstance(module, StdConv2d):
            module.kernel = filters
