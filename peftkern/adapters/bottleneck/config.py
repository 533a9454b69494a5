"""What a bottleneck adapter is made of, in this package's words and in AdapterHub's."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .reference import ACTIVATIONS

__all__ = ["NAMED", "PLACES", "PEFT_TYPE", "BottleneckConfig"]

PEFT_TYPE = "BOTTLENECK"
PLACES = ("attention", "cross_attention", "mlp")
_READS = ("output", "input", "sum")
_INITS = ("houlsby", "mam_adapter", "bert")
_SCALINGS = ("learned", "channel")


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig:
    """Bottleneck adapters y + scaling * (act(x A^T + a) B^T + b), with y what the residual addition would
    add.

    Args:
        places: the sublayers that get one: "attention", "mlp", "cross_attention".
        reads: what x is. "output": the sublayer's output, y itself (Houlsby et al., 2019). "input": what
            the sublayer reads, after the norm of a pre-norm layer (parallel: He et al., 2022). "sum": the
            stream after the residual addition, normed where a norm follows at once (Pfeiffer et al., 2021,
            and AdapterHub's `original_ln_before`).
        size: width of the bottleneck; None: the hidden size divided by `reduction_factor`.
        reduction_factor: a number, or {"0": 8, ..., "default": 16} by the number of the layer.
        activation: relu, silu (swish), gelu, gelu_tanh (gelu_new), tanh, sigmoid, leakyrelu, or identity.
        scaling: a number; "learned": one trained number a place, which begins at 1; "channel": one a channel.
        init: "houlsby": normal of deviation 1e-2, cut at two deviations, on both matrices (Houlsby et al.,
            section 3.6); "mam_adapter": Kaiming on A, B = 0, so that the adapted model begins as the base,
            bit for bit; "bert": normal of deviation 0.02 on both, AdapterHub's default, which is no
            identity at the start. Biases begin at 0.
        bias: whether a and b are there.
        dropout: of the bottleneck's activation, in training.
        leave_out: numbers of the layers that get none.
        modules_to_save: names of modules that are trained whole and saved with the adapter, such as a new
            head ("classifier"); as PEFT's of the same name.
    Raises: ValueError naming the field, what was got and what was expected.
    """

    places: tuple[str, ...] = ("attention", "mlp")
    reads: str = "output"
    size: int | None = None
    reduction_factor: float | Mapping[str, float] = 16.0
    activation: str = "silu"
    scaling: float | str = 1.0
    init: str = "houlsby"
    bias: bool = True
    dropout: float = 0.0
    leave_out: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "places", (self.places,) if isinstance(self.places, str) else tuple(self.places)
        )
        object.__setattr__(self, "leave_out", tuple(self.leave_out))
        saved = self.modules_to_save or ()
        object.__setattr__(self, "modules_to_save", (saved,) if isinstance(saved, str) else tuple(saved))
        object.__setattr__(
            self, "activation", _SYNONYMS.get(str(self.activation).lower(), str(self.activation).lower())
        )
        if not self.places or not set(self.places) <= set(PLACES):
            raise ValueError(f"places: got {self.places}, expected some of {', '.join(PLACES)}")
        for name, allowed in (("reads", _READS), ("init", _INITS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if self.scaling not in _SCALINGS and not _is_number(self.scaling):
            raise ValueError(f"scaling: got {self.scaling!r}, expected a number, 'learned' or 'channel'")
        if self.size is not None and not (isinstance(self.size, int) and self.size >= 1):
            raise ValueError(f"size: got {self.size!r}, expected a whole number of at least 1, or None")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout: got {self.dropout!r}, expected at least 0 and less than 1")
        if any(not isinstance(layer, int) or layer < 0 for layer in self.leave_out):
            raise ValueError(
                f"leave_out: got {list(self.leave_out)}, expected numbers of layers, the first of which is 0"
            )
        if not all(isinstance(name, str) and name for name in self.modules_to_save):
            raise ValueError(f"modules_to_save: got {list(self.modules_to_save)}, expected names of modules")
        self._check_factors()

    def _check_factors(self) -> None:
        factors = self.reduction_factor
        if isinstance(factors, Mapping):
            object.__setattr__(self, "reduction_factor", {str(key): value for key, value in factors.items()})
            unknown = [key for key in factors if str(key) != "default" and not str(key).isdigit()]
            if unknown:
                raise ValueError(
                    f"reduction_factor: got the keys {unknown}, expected numbers of layers and 'default'"
                )
        values = factors.values() if isinstance(factors, Mapping) else (factors,)
        if any(not _is_number(value) or value <= 0 for value in values):
            raise ValueError(f"reduction_factor: got {factors!r}, expected numbers greater than 0")

    def size_at(self, layer: int, hidden: int) -> int:
        """The width of the bottleneck in a layer of that number and hidden size, at least 1."""
        if self.size is not None:
            return self.size
        factor = self.reduction_factor
        if isinstance(factor, Mapping):
            if str(layer) not in factor and "default" not in factor:
                raise ValueError(
                    f"reduction_factor: names neither layer {layer} nor a 'default'; add one of them"
                )
            factor = factor.get(str(layer), factor.get("default"))
        return max(1, int(hidden // factor))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of the fields."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def parse(cls, text: str) -> BottleneckConfig:
        """The configuration of a name such as "double_seq_bn" or
        "seq_bn[reduction_factor=8,leave_out=[0,1]]".

        The names and keys are AdapterHub's, and this class's own keys are taken too. Different here, as
        both help: the start is near the identity ("houlsby") where AdapterHub's is not ("bert"), and
        "input" means what the sublayer reads, after the norm of a pre-norm layer, where AdapterHub's
        parallel adapter reads the stream before that norm.

        >>> BottleneckConfig.parse("par_bn[reduction_factor=4,scaling=learned]").scaling
        'learned'
        """
        match = re.fullmatch(r"\s*([\w+]+)\s*(?:\[(.*)\])?\s*", text, flags=re.DOTALL)
        if match is None:
            raise ValueError(
                f"configuration: got {text!r}, expected NAME or NAME[key=value,...], as in"
                " seq_bn[reduction_factor=8]"
            )
        name, options = match.group(1), match.group(2)
        if name not in NAMED:
            if name in _OTHER:
                raise ValueError(
                    f"configuration: {name!r} is AdapterHub's name of {_OTHER[name]}, which is not built here"
                )
            raise ValueError(f"configuration: got the name {name!r}, expected one of {', '.join(NAMED)}")
        return cls.from_adapterhub(NAMED[name] | (_options(options) if options else {}))

    @classmethod
    def from_adapterhub(cls, values: Mapping[str, Any]) -> BottleneckConfig:
        """The configuration of AdapterHub's dictionary (`BnConfig.to_dict()`, or the "config" of its
        adapter_config.json).

        Raises: ValueError for a key that is unknown, or asks for what is not built here (Compacter, gating,
        new norms, invertible adapters, stochastic depth).
        """
        values, own = dict(values), {field.name for field in dataclasses.fields(cls)}
        for key, absent in _ABSENT.items():
            if values.pop(key, absent[0]) not in absent:
                raise ValueError(
                    f"{key}: only {absent[0]!r} is built here; AdapterHub's other values are not"
                )
        places = [place for key, place in _PLACE_KEYS.items() if values.pop(key, False)]
        parallel, summed = values.pop("is_parallel", False), values.pop("original_ln_before", False)
        translated = {
            "places": tuple(places),
            "reads": "input" if parallel else "sum" if summed else "output",
        }
        translated |= {_KEYS[key]: values.pop(key) for key in list(values) if key in _KEYS}
        translated |= {key: values.pop(key) for key in list(values) if key in own}
        left = [key for key in values if key not in _IGNORED]
        if left:
            raise ValueError(
                f"configuration: unknown keys {', '.join(left)}; known are"
                f" {', '.join((*_PLACE_KEYS, *_KEYS, *sorted(own)))}"
            )
        return cls(**translated)


_SYNONYMS = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_orig": "gelu",
    "linear": "identity",
}
_SYNONYMS |= {"leaky_relu": "leakyrelu", "none": "identity"}
_PLACE_KEYS = {"mh_adapter": "attention", "cross_adapter": "cross_attention", "output_adapter": "mlp"}
_KEYS = {"non_linearity": "activation", "init_weights": "init"}
# Keys with the values that mean "not used": what is built here is the same without them.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "original_ln_after": (True,),
    "ln_before": (False,),
    "ln_after": (False,),
    "use_gating": (False,),
    "residual_before_ln": (True,),
    "inv_adapter": (None, False),
    "phm_layer": (False,),
    "stochastic_depth": (0.0, None),
}
# What only matters with the keys above.
_IGNORED = (
    "adapter_residual_before_ln",
    "inv_adapter_reduction_factor",
    "phm_dim",
    "factorized_phm_W",
    "shared_W_phm",
    "architecture",
)
_IGNORED += (
    "shared_phm_rule",
    "factorized_phm_rule",
    "phm_c_init",
    "phm_init_range",
    "learn_phm",
    "hypercomplex_nonlinearity",
)
_IGNORED += ("phm_rank", "phm_bias", "init_weights_seed")

_DOUBLE = {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "reduction_factor": 16.0}
_SINGLE = {
    "output_adapter": True,
    "original_ln_before": True,
    "non_linearity": "relu",
    "reduction_factor": 16.0,
}
_PARALLEL = {
    "output_adapter": True,
    "is_parallel": True,
    "non_linearity": "relu",
    "reduction_factor": 2.0,
    "scaling": 4.0,
}
_PARALLEL |= {"init_weights": "mam_adapter"}
_SCALED = _PARALLEL | {"scaling": "learned"}

NAMED: dict[str, dict[str, Any]] = {
    "double_seq_bn": _DOUBLE,
    "seq_bn": _SINGLE,
    "par_bn": _PARALLEL,
    "scaled_par_bn": _SCALED,
    "houlsby": _DOUBLE,
    "pfeiffer": _SINGLE,
    "parallel": _PARALLEL,
    "scaled_parallel": _SCALED,
}
_OTHER = dict.fromkeys(
    ("seq_bn_inv", "double_seq_bn_inv", "pfeiffer+inv", "houlsby+inv"),
    "adapters with invertible ones at the embedding",
)
_OTHER |= dict.fromkeys(("compacter", "compacter++"), "adapters whose matrices are Kronecker products")
_OTHER |= dict.fromkeys(("mam", "unipelt"), "several kinds together")
_OTHER |= dict.fromkeys(
    ("lora", "ia3", "prompt_tuning", "loreft", "noreft", "direft", "prefix_tuning"), "another kind of adapter"
)


def _options(text: str) -> dict[str, Any]:
    """The keys and values of "key=value,...": Python literals, and bare words as strings."""
    parts = re.split(r",(?![^\[{(]*[\]})])", text)
    values = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(
                f"configuration: got {part.strip()!r} between the brackets, expected key=value, as in"
                " reduction_factor=8"
            )
        try:
            values[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            values[key.strip()] = value.strip()
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
