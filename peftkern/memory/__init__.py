"""Memory in separable pieces, each usable in a loop of one's own: docs/memory.md explains each with an
example.

Importing this package imports none of them: a name is fetched when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AttentionReport": "attention_groups",
    "Budgets": "tiers",
    "CheckpointStore": "store",
    "NormReport": "norms",
    "Sharded": "sharding",
    "SpillError": "movers",
    "StoreFull": "tiers",
    "Tier": "tiers",
    "TileReport": "tiled_mlp",
    "TileRow": "tiled_mlp",
    "WeightsError": "stored_weights",
    "adamw": "optimizers",
    "attention_by_groups": "attention_groups",
    "attention_whole": "attention_groups",
    "capped_attention": "attention_tiles",
    "checkpoint_layers": "checkpoint",
    "ddp": "sharding",
    "embedding_on_host": "embedding",
    "grouped_sdpa": "attention_groups",
    "host_available": "host",
    "host_limit": "host",
    "ignore_frozen": "sharding",
    "keep_norms": "norms",
    "layers_on_host": "host_layers",
    "load_4bit": "loading",
    "load_state": "sharded_state",
    "loss_tile": "tiles",
    "mlp_tile": "tiles",
    "newest_state": "sharded_state",
    "rebuild_norms": "norms",
    "save_adapter": "sharded_state",
    "save_state": "sharded_state",
    "shard": "sharding",
    "tile_loss": "tiled_loss",
    "tile_mlps": "tiled_mlp",
    "untile_mlps": "tiled_mlp",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
