"""The modules that stand in a model where bottleneck adapters act: `base_layer` is what stood there
before."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import BottleneckConfig
from .function import bottleneck

__all__ = ["Bottleneck", "BottleneckLayer", "Handover", "InputTap", "Source"]


class Handover:
    """What a tap has seen, until the layer that adds the branch takes it; by device, for replicas of a
    model share it."""

    def __init__(self) -> None:
        self.held: dict[torch.device, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"held": {}}


class Source:
    """Where an adapter's x comes from.

    kind: "output" (of the module it stands on), "norm" (its module is a norm, which is given the stream:
    the branch is added before it), "argument" (of the module, by name or index), or "handover" (from an
    InputTap).
    """

    def __init__(self, kind: str, name: str = "", index: int = -1, handover: Handover | None = None) -> None:
        self.kind, self.name, self.index, self.handover = kind, name, index, handover

    def argument(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The argument of the call that is meant."""
        return kwargs[self.name] if self.name in kwargs else args[self.index]


class Bottleneck(nn.Module):
    """One adapter at one place; see `function.bottleneck`. Its parameters: down [R, K], up [N, R],
    down_bias [R], up_bias [N], and learned_scaling [1] or [N] where the scaling is trained."""

    def __init__(
        self,
        config: BottleneckConfig,
        layer: int,
        width: int,
        source: Source,
        *,
        device: Any,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        size = config.size_at(layer, width)
        self.config, self.source = config, source

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device="cpu"))

        self.down, self.up = parameter(size, width), parameter(width, size)
        self.down_bias, self.up_bias = (parameter(size), parameter(width)) if config.bias else (None, None)
        self.learned_scaling = None
        if isinstance(config.scaling, str):
            self.learned_scaling = parameter(width if config.scaling == "channel" else 1)
        self.reset_parameters()
        self.to(device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the start anew, from torch's generator on the CPU: the same on every device."""
        if self.config.init == "mam_adapter":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            self.up.zero_()
        else:
            std, cut = (1e-2, 2.0) if self.config.init == "houlsby" else (0.02, math.inf)
            for weight in (self.down, self.up):
                (
                    nn.init.normal_(weight, std=std)
                    if cut == math.inf
                    else nn.init.trunc_normal_(weight, std=std, a=-cut * std, b=cut * std)
                )
        for bias in (self.down_bias, self.up_bias):
            if bias is not None:
                bias.zero_()
        if self.learned_scaling is not None:
            self.learned_scaling.fill_(1.0)

    @property
    def scaling(self) -> float | Tensor:
        """What the branch is multiplied by."""
        return float(self.config.scaling) if self.learned_scaling is None else self.learned_scaling

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., N] with the branch of x [..., K] added, in y's dtype."""
        weights = (self.down, self.up, self.down_bias, self.up_bias)
        dropout_p = self.config.dropout if self.training else 0.0
        return bottleneck(
            y, x, *weights, self.scaling, activation=self.config.activation, dropout_p=dropout_p
        )

    def extra_repr(self) -> str:
        return (
            f"{self.down.shape[1]} -> {self.down.shape[0]} -> {self.up.shape[0]}, {self.config.activation},"
            f" reads {self.config.reads}"
        )


class _Around(nn.Module):
    """A module in another's place, which passes for it wherever its attributes are asked for."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None or name.startswith("lora_"):  # it is no LoRA layer, even around one
                raise
            return getattr(base, name)


class BottleneckLayer(_Around):
    """A module and the adapters on it: the active ones' branches are summed, all reading the unadapted
    activation."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.bottlenecks = nn.ModuleDict()
        self.active: tuple[str, ...] = ()  # the active adapters that are here
        self.disable_adapters = False

    def enable_adapters(self, enabled: bool) -> None:
        """Let the adapters act or not, as PEFT's layers do."""
        self.disable_adapters = not enabled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer gives, adapted; of a tuple its first element."""
        adapters = [] if self.disable_adapters else [self.bottlenecks[name] for name in self.active]
        out = self.base_layer(*args, **kwargs)
        if not adapters:
            return out
        normed = [adapter for adapter in adapters if adapter.source.kind == "norm"]
        if normed:
            out = self._before_norm(normed, out, args, kwargs)
        y = out[0] if isinstance(out, tuple) else out
        total = y
        for adapter in adapters:
            source = adapter.source
            if source.kind == "output":
                total = adapter(total, y)
            elif source.kind == "argument":
                total = adapter(total, source.argument(args, kwargs))
            elif source.kind == "handover":
                total = adapter(total, source.handover.held.pop(y.device))
        return (total, *out[1:]) if isinstance(out, tuple) else total

    def _before_norm(
        self, adapters: list[Bottleneck], out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """norm(t + branch(norm(t))) for the norm's input t."""
        stream = args[0] if args else next(iter(kwargs.values()))
        for adapter in adapters:
            stream = adapter(stream, out)
        return self.base_layer(stream, *args[1:]) if args else self.base_layer(**{next(iter(kwargs)): stream})


class InputTap(_Around):
    """A module whose input an adapter elsewhere reads."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.taps: dict[str, Source] = {}  # by adapter
        self.active: tuple[str, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer gives."""
        for name in self.active:
            x = self.taps[name].argument(args, kwargs)
            self.taps[name].handover.held[x.device] = x
        return self.base_layer(*args, **kwargs)
