"""transformers' 4-bit quantizer with one thing changed: weights are quantized from slices as they are read.

transformers builds the model, renames and converts what checkpoints spell otherwise, ties weights, makes
buffers. It is given the stored tensors as a state_dict whose values are read when they are asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from .sliced_quantize import dense_slices, quantize_slices
from .stored_weights import StoredTensor

__all__ = ["LazyWeights", "SlicedConfig"]

_METHOD = "peftkern_sliced_4bit"


class _Lazy:
    """A stored tensor with what transformers asks of the values of a state_dict: `tensor[...]`, then
    `.to(device=, dtype=)`. That is when it is read, and quantized where `like` tells the format."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored = stored
        self.like: Any = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.stored.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def get_shape(self) -> list[int]:
        return list(self.stored.shape)

    def get_dtype(self) -> str:
        return self.stored.kind

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Any:
        return self if index is Ellipsis else self.stored.dense("cpu")[index]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        device = "cpu" if device is None else device
        if self.like is None:
            return self.stored.dense(device, dtype)
        return quantize_slices(
            self.stored.slices(), self.like, self.stored.shape, dtype or self.dtype, device
        )


class LazyWeights:
    """The values of a state_dict, and which of them are quantized straight from the file."""

    def __init__(
        self, tensors: Mapping[str, StoredTensor], key_mapping: dict[str, str] | None = None
    ) -> None:
        self.state_dict = {name: _Lazy(stored) for name, stored in tensors.items()}
        self._key_mapping = key_mapping

    def plan(self, model: PreTrainedModel, quantizer: Bnb4BitHfQuantizer) -> None:
        """Mark what becomes a 4-bit weight with at most another name; all else is read dense."""
        for source, target in _renamed(model, quantizer, self.state_dict, self._key_mapping).items():
            if quantizer.param_needs_quantization(model, target):
                module = model.get_submodule(target.rpartition(".")[0])
                if not issubclass(module.source_cls, Conv1D):  # stored transposed
                    self.state_dict[source].like = module.weight


class SlicedConfig(BitsAndBytesConfig):
    """A BitsAndBytesConfig by which transformers finds the quantizer below; a copy of it is the plain one."""

    def __init__(self, plain: BitsAndBytesConfig, weights: LazyWeights) -> None:
        vars(self).update(vars(plain))
        self.quant_method = _METHOD
        self.plain, self.weights = plain, weights

    def __deepcopy__(self, memo: dict[int, Any]) -> BitsAndBytesConfig:
        return copy.deepcopy(self.plain, memo)


@register_quantizer(_METHOD)
class _SlicedQuantizer(Bnb4BitHfQuantizer):
    quantization_config: SlicedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        self.quantization_config.weights.plan(model, self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Leave the model as transformers' own quantizer does."""
        plain = self.quantization_config.plain
        model.config.quantization_config = plain
        model.quantization_method = plain.quant_method
        stock = Bnb4BitHfQuantizer(plain, pre_quantized=False)
        vars(stock).update(
            {name: value for name, value in vars(self).items() if name != "quantization_config"}
        )
        model.hf_quantizer = stock
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeDense()


class _QuantizeDense(ConversionOps):
    """Quantizes what could only be read dense; what was quantized from the file passes through."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        found = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            module = model.get_submodule(name.rpartition(".")[0])
            if not getattr(value, "bnb_quantized", False):
                value = value.T if issubclass(module.source_cls, Conv1D) else value
                slices = dense_slices(value)
                value = quantize_slices(slices, module.weight, tuple(value.shape), value.dtype, value.device)
            module._is_hf_initialized = True
            found[name] = value
        return found


def _renamed(
    model: PreTrainedModel, quantizer: Any, names: Mapping[str, Any], key_mapping: dict[str, str] | None
) -> dict[str, str]:
    """Stored name -> name in the model, of the tensors that no conversion but a renaming is for.

    Nothing where this version of transformers renames in another way: then all tensors are read dense.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        # Copies: a transform notes that it was used.
        transforms = copy.deepcopy(get_model_conversion_mapping(model, key_mapping, quantizer))
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        meta, prefix, found = model.state_dict(), model.base_model_prefix, {}
        for name in names:
            target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
            if target not in meta and name in meta:
                target, pattern = rename_source_key(
                    name, [], [], base_model_prefix=prefix, meta_state_dict=meta
                )
            if pattern is None and target in meta:
                found[name] = target
    except (ImportError, TypeError, AttributeError):
        return {}
    return found
