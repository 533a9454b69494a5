"""Small layers of the pre-norm form, and others that are nearly of it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.proj(x) * scale


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8) + 0.5), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Layer(nn.Module):
    factor = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = Norm(), Attention(), Norm(), Attention()

    def forward(self, x, scale=1.0):
        h = x + self.attn(self.norm1(x), scale=scale)
        return (h + self.mlp(self.norm2(h)),)


class Scaled(Layer):
    def forward(self, x):
        h = x + 0.5 * self.attn(self.norm1(x))
        return h + self.mlp(self.norm2(h))


class ByAttribute(Layer):
    def forward(self, x):
        h = x + self.factor * self.attn(self.norm1(x))
        return h + self.mlp(self.norm2(h))


class Parallel(Layer):
    def forward(self, x):
        return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


class PostNorm(Layer):
    def forward(self, x):
        h = self.norm1(x + self.attn(x))
        return self.norm2(h + self.mlp(h))


class NormedStream(Layer):
    def forward(self, x):
        x = self.norm1(x)
        h = x + self.attn(x)
        return h + self.mlp(self.norm2(h))


class OneNorm(Layer):
    def forward(self, x):
        h = x + self.attn(self.norm1(x))
        return h + self.mlp(self.norm1(h))


class Branching(Layer):
    def forward(self, x, skip=False):
        if skip:
            return x
        h = x + self.attn(self.norm1(x))
        return h + self.mlp(self.norm2(h))


class Typed(Layer):
    def forward(self, x):
        h = x + self.attn(self.norm1(x)).float()
        return h + self.mlp(self.norm2(h))


class Constant(Layer):
    def forward(self, x):
        h = x + self.attn(self.norm1(x), scale=2.0)
        return h + self.mlp(self.norm2(h))


class Extra(Layer):
    def forward(self, x):
        h = x + self.attn(self.norm1(x))
        return h + self.mlp(self.norm2(h)), h


def wrapping(function):
    @functools.wraps(function)
    def wrapper(self, *args, **kwargs):
        return function(
            self, *args, **{name: value for name, value in kwargs.items() if name != "deprecated"}
        )

    return wrapper


class Wrapped(Layer):
    forward = wrapping(Layer.forward)


class Opaque(Layer):
    @functools.wraps(Layer.forward)
    def forward(self, x):
        return Layer.forward(self, x)


OTHERS = [Scaled, ByAttribute, Parallel, PostNorm, NormedStream, OneNorm, Branching, Typed, Constant, Extra]
