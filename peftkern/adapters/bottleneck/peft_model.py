"""Bottleneck adapters as a `peft.PeftModel`: for the Hugging Face Trainer, TRL, and whatever asks whether a
model is PEFT's.

PEFT has no bottleneck and no way to register one, so that `PeftModel.from_pretrained` of PEFT itself does
not read these folders; `BottleneckModel.from_pretrained` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

try:
    from peft import PeftConfig, PeftModel
except ImportError as _error:
    raise ModuleNotFoundError(
        "BottleneckModel needs peft, which is not installed: run pip install 'peftkern[peft]'"
    ) from _error

from . import saved
from .attach import (
    add_bottleneck,
    attached,
    bottleneck_disabled,
    bottlenecks,
    remove_bottleneck,
    set_bottleneck,
)
from .config import PEFT_TYPE, BottleneckConfig
from .files import CONFIG, load_bottleneck, read_config, save_bottleneck

__all__ = ["BottleneckModel", "BottleneckPeftConfig", "get_bottleneck_model"]

_NOT_MERGEABLE = (
    "a bottleneck adapter cannot be merged into the base: its activation makes it no linear map of the"
    " weights. Keep it beside the base, or take it away with unload()"
)


@dataclass
class BottleneckPeftConfig(PeftConfig):
    """A BottleneckConfig where PEFT wants a PeftConfig."""

    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)
    modules_to_save: list[str] | None = None


def get_bottleneck_model(
    model: nn.Module,
    config: BottleneckConfig | str = "double_seq_bn",
    *,
    adapter_name: str = "default",
    task_type: str | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> BottleneckModel:
    """The model with a new bottleneck adapter to train, as a PeftModel; arguments and errors as those of
    `add_bottleneck`.

    task_type: as PEFT's ("CAUSAL_LM"), noted in adapter_config.json. For "SEQ_CLS", "TOKEN_CLS" and
        "QUESTION_ANS" the model's head is trained whole and saved as well, as PEFT does.
    """
    config = BottleneckConfig.parse(config) if isinstance(config, str) else config
    heads = [name for name in saved.HEADS.get(task_type or "", ()) if hasattr(model, name)]
    whole = tuple(dict.fromkeys((*config.modules_to_save, *heads)))
    config = dataclasses.replace(config, modules_to_save=whole)
    add_bottleneck(model, config, name=adapter_name, example_inputs=example_inputs)
    return BottleneckModel(model, adapter_name, task_type)


class BottleneckModel(PeftModel):
    """A model with bottleneck adapters; make it by `get_bottleneck_model` or
    `BottleneckModel.from_pretrained`.

    Not mergeable: merge_adapter, merge_and_unload and unmerge_adapter raise NotImplementedError.
    """

    def __init__(self, model: nn.Module, adapter_name: str = "default", task_type: str | None = None) -> None:
        if attached(model) is None:
            raise ValueError("model: has no bottleneck adapter; get_bottleneck_model puts one on it")
        nn.Module.__init__(self)
        self.base_model = model
        self.active_adapter = adapter_name
        self.peft_type = PEFT_TYPE
        self.special_peft_forward_args = {"adapter_names"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        self._configs = {
            name: self._describe(config, task_type) for name, config in attached(model).configs.items()
        }
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            self._prepare_model_for_gradient_checkpointing(model)

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configurations by adapter."""
        return self._configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that run."""
        return list(attached(self.base_model).active)

    def get_base_model(self) -> nn.Module:
        """The model itself, on which the adapters are."""
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted model gives."""
        _refuse_names(kwargs)
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted model generates."""
        _refuse_names(kwargs)
        return self.base_model.generate(*args, **kwargs)

    def add_adapter(
        self, adapter_name: str, peft_config: BottleneckConfig | BottleneckPeftConfig | str, **options: Any
    ) -> None:
        """Put a further adapter on the model; the active one stays active."""
        config = peft_config.bottleneck if isinstance(peft_config, BottleneckPeftConfig) else peft_config
        before = self.active_adapters
        add_bottleneck(self.base_model, config, name=adapter_name, **options)
        set_bottleneck(self.base_model, before)
        task_type = next((known.task_type for known in self._configs.values()), None)
        self._configs[adapter_name] = self._describe(
            attached(self.base_model).configs[adapter_name], task_type
        )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let this adapter run, or several, their branches summed; they train unless `inference_mode`."""
        set_bottleneck(self.base_model, adapter_name, trainable=not inference_mode)
        self.active_adapter = self.active_adapters[0]

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away. The last one goes with `unload`, the active one when another is set."""
        if self.active_adapters == [adapter_name]:
            others = [name for name in self._configs if name != adapter_name]
            how = f"set_adapter({others[0]!r}) first" if others else "unload() gives the base back"
            raise ValueError(f"adapter_name: {adapter_name!r} is the active adapter; {how}")
        remove_bottleneck(self.base_model, adapter_name)
        del self._configs[adapter_name]
        self.active_adapter = self.active_adapters[0]

    def unload(self) -> nn.Module:
        """The base as it was, without any adapter."""
        remove_bottleneck(self.base_model)
        self._configs.clear()
        return self.base_model

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the base answers alone."""
        before, self._adapters_disabled = self._adapters_disabled, True
        try:
            with bottleneck_disabled(self.base_model):
                yield
        finally:
            self._adapters_disabled = before

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Let these adapters train or not, whether they are active or not."""
        wanted = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_names("adapter_names", wanted)
        for _, name, adapter in bottlenecks(self.base_model):
            if name in wanted:
                adapter.requires_grad_(requires_grad)
        for name in wanted:
            for _, copy in saved.trained_copies(self.base_model, name):
                copy.requires_grad_(requires_grad)

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the adapters: "default" into the folder, every other into a folder of its name there, as
        PEFT does."""
        if not safe_serialization:
            raise ValueError("safe_serialization: got False; adapters are written as safetensors only")
        self._check_names("selected_adapters", selected_adapters or ())
        if not is_main_process:
            return
        for name in selected_adapters or self._configs:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            state = None if state_dict is None else self._of_state(state_dict, name)
            save_bottleneck(
                self.base_model, folder, name=name, state=state, task_type=self._configs[name].task_type
            )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **kwargs: Any,
    ) -> BottleneckModel:
        """A base with the adapter that a folder holds, or a repository of a model hub."""
        folder = _folder(model_id)
        values = read_config(folder)[1]
        load_bottleneck(
            model,
            folder,
            name=adapter_name,
            trainable=is_trainable,
            example_inputs=kwargs.get("example_inputs"),
        )
        adapted = cls(model, adapter_name, values.get("task_type"))
        return adapted if is_trainable else adapted.eval()

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **kwargs: Any
    ) -> None:
        """Put a further saved adapter on the model, not active yet; one of that name takes the saved
        values."""
        folder = _folder(model_id)
        if adapter_name in self._configs:
            load_bottleneck(self.base_model, folder, name=adapter_name)
            return
        before = self.active_adapters
        load_bottleneck(self.base_model, folder, name=adapter_name, trainable=is_trainable)
        config, values = read_config(folder)
        self._configs[adapter_name] = self._describe(config, values.get("task_type"))
        set_bottleneck(self.base_model, before)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises NotImplementedError: a bottleneck is not mergeable."""
        raise NotImplementedError(_NOT_MERGEABLE)

    merge_and_unload = unmerge_adapter = merge_adapter

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: a bottleneck is no linear change of a weight."""
        return False

    def _check_names(self, argument: str, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._configs]
        if unknown:
            raise ValueError(
                f"{argument}: there is no adapter {unknown[0]!r}; there are {', '.join(self._configs)}"
            )

    def _describe(self, config: BottleneckConfig, task_type: str | None) -> BottleneckPeftConfig:
        name = getattr(self.base_model, "name_or_path", None) or None
        described = BottleneckPeftConfig(task_type=task_type, bottleneck=config)
        described.modules_to_save = list(config.modules_to_save) or None
        described.peft_type, described.base_model_name_or_path = PEFT_TYPE, name
        return described

    def _of_state(self, state: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
        """The adapter's tensors in a state dict of this model, by the names they are saved under."""
        mark, whole, found = f".bottlenecks.{name}.", f".modules_to_save.{name}.", {}
        for key, value in state.items():
            if whole in key:
                found[key.removeprefix("base_model.").replace(whole, ".")] = value
            elif mark in key:
                path, _, parameter = key.partition(mark)
                plain = ".".join(
                    part for part in path.removeprefix("base_model.").split(".") if part != "base_layer"
                )
                found[f"{plain}.bottleneck.{parameter}"] = value
        return found


def _refuse_names(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            "adapter_names: bottleneck adapters are not mixed within a batch; call the model once an adapter"
        )


def _folder(model_id: str | Path) -> Path:
    """A local folder, or what a hub's repository of that name holds."""
    if (Path(model_id) / CONFIG).is_file() or Path(model_id).exists():
        return Path(model_id)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model_id), allow_patterns=["adapter_*"]))
    except Exception as error:  # the hub's errors are of many kinds
        raise FileNotFoundError(
            f"{model_id}: is no folder, and no repository that could be fetched: {error}"
        ) from error
