"""What of a run its memory depends on, and where its checkpoints and weights lie."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ...errors import InputError
from .bottleneck import Bottlenecks

__all__ = ["ATTENTION", "OPTIMIZERS", "ROWS", "RunOptions"]

ATTENTION = ("flash", "efficient", "cudnn", "math")
ROWS = ("whole", "packed", "padded")
OPTIMIZERS = ("paged_adamw_8bit", "adamw_8bit", "adamw")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A run of peftkern's patched layers with a LoRA on every linear of the decoder layers, bottlenecks, or a
    prefix.

    length, batch: tokens of a sequence, sequences at a time. rows: one of ROWS, what the sequences are: one
    document each and all of one length; several documents each, kept apart, and the batch put together as one
    row, as TRL does; or of several lengths, filled up. rank, adapter_bytes: of the adapters, 4 for fp32
    and 2 for 16 bits; rank 0: no LoRA. bottleneck: adapters of that kind, in the place of LoRA. prefix:
    tokens of a prefix inside attention, without a gate, in the place of both; 0: none. targets: last
    words of the names of the linears that have one; None: all. dtype_bytes: of activations and dense weights.
    four_bit, nested, blocksize: of the base's linears. dropout, dora: of the adapters.
    checkpointing: only layers' inputs are kept, a layer is computed again in backward. keep_layers: how many
    of these inputs stay on the device, the last layers', None for all; the last one always does. disk_layers:
    how many of the others go to a file, the first layers'; what is left goes to the host.
    mlp_tile: tokens of the MLP at a time, None for all. loss_tile: rows of logits at a time, None for the
    library's own choice. kv_groups: attention's backward a key/value head at a time; where
    attention has no fused kernel, forward and backward by tiles of queries too. rebuild_norms: the
    norms' outputs are computed again in backward.
    embedding_on_host: the embedding is a lookup on the host. layers_on_host: packed layers are streamed from
    the host through `layer_slots` slots.
    cards: the model is divided among so many by FSDP2 (`peftkern.memory.shard`), each with its own batches.
    replicas: so many processes have the whole model each, whose gradients DistributedDataParallel averages.
    optimizer: one of OPTIMIZERS. accumulation: batches of a step. attention: one of ATTENTION.
    fused_loss: no logits are kept. deterministic: torch.use_deterministic_algorithms is on.
    """

    length: int = 1024
    batch: int = 1
    rows: str = "whole"
    rank: int = 16
    bottleneck: Bottlenecks | None = None
    prefix: int = 0
    targets: tuple[str, ...] | None = None
    adapter_bytes: int = 4
    dtype_bytes: int = 2
    four_bit: bool = True
    nested: bool = True
    blocksize: int = 64
    dropout: bool = False
    dora: bool = False
    checkpointing: bool = True
    keep_layers: int | None = None
    disk_layers: int = 0
    mlp_tile: int | None = None
    loss_tile: int | None = None
    kv_groups: bool = False
    rebuild_norms: bool = False
    embedding_on_host: bool = False
    layers_on_host: bool = False
    layer_slots: int = 2
    cards: int = 1
    replicas: int = 1
    optimizer: str = "paged_adamw_8bit"
    accumulation: int = 1
    attention: str = "flash"
    fused_loss: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "batch", "accumulation", "layer_slots", "cards", "replicas"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("mlp_tile", "loss_tile"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least 1, or none")
        for name, allowed in (
            ("optimizer", OPTIMIZERS),
            ("attention", ATTENTION),
            ("rows", ROWS),
            ("adapter_bytes", (2, 4)),
            ("dtype_bytes", (2, 4)),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name}: got {getattr(self, name)!r}, expected one of {allowed}")
        for name in ("keep_layers", "disk_layers"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise InputError(f"{name}: got {getattr(self, name)}, expected at least 0")
        if self.cards > 1 and self.replicas > 1:
            raise InputError(
                f"cards: got {self.cards} with replicas {self.replicas}: a model is divided among the"
                " processes or whole in each of them; give one of the two"
            )
        if self.rank < 0:
            raise InputError(f"rank: got {self.rank}, expected at least 0")
        if self.prefix < 0:
            raise InputError(f"prefix: got {self.prefix}, expected at least 0 tokens")
        if bool(self.rank) + bool(self.prefix) + (self.bottleneck is not None) > 1:
            raise InputError(
                f"rank: got {self.rank} beside bottlenecks or a prefix, expected 0: a run has one kind of"
                " adapter"
            )

    def rank_of(self, name: str) -> int:
        """The rank of the adapter on a linear of this name; 0 where it has none."""
        return self.rank if self.targets is None or name in self.targets else 0

    def away(self, layers: int) -> int:
        """Checkpoints that leave the device."""
        return layers - self.kept(layers) if self.checkpointing else 0

    def on_disk(self, layers: int) -> int:
        """Checkpoints that go to the file."""
        return min(self.disk_layers, self.away(layers))

    @property
    def tokens(self) -> int:
        """Of one batch."""
        return self.length * self.batch

    @property
    def storable(self) -> bool:
        """Whether layers' inputs and weights may leave the device one by one: adapters around the layers hide
        these."""
        return self.bottleneck is None or self.bottleneck.reads != "sum"

    @property
    def processes(self) -> int:
        """Of the run, each with batches of its own."""
        return self.cards * self.replicas

    @property
    def row(self) -> tuple[int, int]:
        """Rows of the batch as attention sees it, and the tokens of one."""
        return (1, self.tokens) if self.rows == "packed" else (self.batch, self.length)

    def kept(self, layers: int) -> int:
        """Checkpoints that stay on the device."""
        return layers if self.keep_layers is None else min(max(self.keep_layers, 1), layers)

    def but(self, **changes: Any) -> RunOptions:
        """A copy with other values."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
