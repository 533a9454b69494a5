"""The input embedding on the host: its rows are looked up there, and only they are copied to the device."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HostEmbedding", "embedding_on_host"]

_TOKENS = 8192  # looked up at a time: the rows between host and device stay bounded


def embedding_on_host(model: nn.Module, *, device: torch.device | str | None = None) -> HostEmbedding:
    """Move the model's frozen input embedding to the host, and look tokens up there.

    It saves vocabulary x width x 2 bytes of the device (1.05 GB of an 8B model) for tokens x width x 2 bytes
    over the bus a forward. The ids are read on the host: where they are on the device, the host waits for
    them once a forward. The numbers are the same.

    Args:
        model: a model of transformers, with or without PEFT.
        device: where the rows go; default: where the embedding is.
    Returns: a handle with `remove`; also a context manager.
    Raises: ValueError where the embedding is trained, adapted, or tied to the head, which multiplies by it
        on the device.
    """
    embedding = model.get_input_embeddings()
    reason = _against(model, embedding)
    if reason:
        raise ValueError(f"model: its input embedding cannot be kept on the host: {reason}")
    return HostEmbedding(embedding, torch.device(device) if device is not None else embedding.weight.device)


def _against(model: nn.Module, embedding: Any) -> str | None:
    if not isinstance(embedding, nn.Embedding):
        return f"it is a {type(embedding).__name__}, expected torch.nn.Embedding without an adapter"
    if embedding.weight.requires_grad:
        return "it is trained; freeze it, or leave it on the device"
    if "forward" in embedding.__dict__:
        return "its forward was replaced on the instance"
    head = model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        return "the head is tied to it and multiplies by it on the device, so that nothing would be saved"
    if any(
        weight is embedding.weight and module is not embedding
        for module in model.modules()
        for weight in module._parameters.values()
    ):
        return "another module shares its weight"
    return None


class HostEmbedding:
    """What `embedding_on_host` did to a model; `remove`, or the end of a `with` block, undoes it."""

    def __init__(self, embedding: nn.Embedding, device: torch.device) -> None:
        self.embedding, self.device, self.before = embedding, device, embedding.weight.device
        embedding._apply(lambda tensor: tensor.to("cpu"))
        embedding.forward = types.MethodType(_look_up_for(device), embedding)

    def remove(self) -> None:
        """Move the embedding back to where it was."""
        if "forward" in self.embedding.__dict__:
            del self.embedding.forward
            self.embedding._apply(lambda tensor: tensor.to(self.before))

    def __enter__(self) -> HostEmbedding:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _look_up_for(device: torch.device) -> Any:
    def forward(self: nn.Embedding, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stock = type(self).forward
        on_host = ids.to("cpu")
        if device.type == "cpu":
            return stock(self, on_host, *args, **kwargs)
        flat = on_host.reshape(-1)
        rows = torch.empty(flat.numel(), self.embedding_dim, dtype=self.weight.dtype, device=device)
        for begin in range(0, flat.numel(), _TOKENS):
            part = stock(self, flat[begin : begin + _TOKENS], *args, **kwargs)
            rows[begin : begin + _TOKENS].copy_(part)
        return rows.view(*ids.shape, self.embedding_dim)

    return forward
