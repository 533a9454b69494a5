"""A training step of peftkern's patched decoder layers as data: what each operator makes and what goes after
it.

The order and the lifetimes are those that a count of the library's own steps shows (tests/memory); letters
are
bytes of the whole batch: h a hidden state, q queries, k keys, i the MLP's inner state, r a rank's fp32
product.
"""

from __future__ import annotations

from .attention import attention_workspace, forward_workspace, mask_bytes, mask_workspace, score_bytes
from .bottleneck import Branches
from .ledger import Ledger
from .step import Step

__all__ = ["run_step"]

_SAVED = "saved activations"
_LAYER = "the layer at work"


def run_step(step: Step, ledger: Ledger) -> Ledger:
    """Forward, loss and backward of one batch; the peaks are in the ledger. What is there all the time is
    not."""
    from .mlp import MLP

    branches = Branches(step, ledger)
    walk = _Walk(step, ledger, MLP(step, ledger, branches), branches)
    walk.forward()
    walk.loss()
    walk.backward()
    return ledger


class _Walk:
    """Layers that are alike between the first and the last are taken in one stride: what is there at them
    lies between what is there at these two.
    """

    def __init__(self, step: Step, ledger: Ledger, mlp: object, branches: Branches) -> None:
        self.step, self.ledger, self.mlp, self.branches = step, ledger, mlp, branches
        self.layers = step.shape.layers

    # ---- forward

    def forward(self) -> None:
        step, ledger = self.step, self.ledger
        if step.options.accumulation > 1:
            grads = step.layer_gradient * self.layers // step.options.cards
            ledger.keep("gradients", grads, "adapters' elements, of the batches before", "gradients")
        ledger.keep("tokens", step.ids, "32 B a token", "other")
        ledger.keep("rotary tables", step.rope, "2·length·d", "other")
        ledger.keep("masks", mask_bytes(step), "batch·S² each", "other")
        ledger.group = _LAYER
        apart = step.options.cards > 1 and not step.shape.tied  # a unit of its own, gathered for its lookup
        table = step.shape.embedding * step.e if apart else 0
        ledger.make("forward", "embedding", scratch=(table, "the embedding, gathered"), x=(step.h, "h"))
        ledger.note("forward", "masks", (mask_workspace(step), "2·batch·S²"))
        if step.options.away(self.layers) or not self._saves_first_input():
            # The model's forward holds it until it returns, whoever else does.
            ledger.keep("embedded tokens", step.h, "h", _LAYER)
            ledger.free("x")
        saved = not step.options.checkpointing
        for layer in self._strides():
            self._layer_forward(layer, saved)
        if (
            saved and step.masked and not (step.own_attention or step.options.prefix)
        ):  # what SDPA made of it is saved in its place
            ledger.free("masks")

    def _strides(self) -> list[int]:
        """The layers that are walked through: the first two, and the last two."""
        return sorted({0, min(1, self.layers - 1), max(self.layers - 2, 0), self.layers - 1})

    def _layer_forward(self, layer: int, saved: bool) -> None:
        ledger = self.ledger
        self._grow(layer, saved)
        ledger.group = _LAYER
        self.attention_forward("forward", saved)
        self.mlp.forward("forward", saved)
        ledger.free("o_y", "mlp_y", *(() if saved else ("s", "n2", "rstd2")))
        if self.branches.outside:
            self.branches.forward("forward", "mlp", saved=True)
        if saved:
            self._save(layer)
        else:
            self.branches.release()
            self._set_checkpoints(layer + 1, self._written_late(layer + 1))
        ledger.free("x")
        ledger.hold([_renamed("x", ledger.bytes_of("x_next"), "h", _LAYER)])
        ledger.free("x_next")

    def _grow(self, layer: int, saved: bool) -> None:
        """What the layers before `layer` have left, if they were not walked through."""
        if layer < 2:
            return
        if saved:
            self._set_saved(layer)
        else:
            self._set_checkpoints(layer, self._written_late(layer))

    def saved_of_layer(self, first: bool = False) -> int:
        """What one layer keeps for backward without checkpointing, its input with it. In the first layer no
        gradient goes on beyond the first bottleneck: the sublayers before it keep nothing."""
        step, branches = self.step, self.branches
        total = (step.h if step.keeps_norm("qkv") else 0) + (step.h if self.mlp.keeps_input() else 0)
        total += branches.saved_bytes()
        starts = step.options.bottleneck is not None and first
        behind_norm = step.starts_late and first
        if not behind_norm:
            total += (0 if first and not self._saves_first_input() else step.h) + step.rstd
        if not starts:
            total += self._attention_saved() - (self._head_norms() if behind_norm else 0)
        if not starts or branches.has("attention"):
            total += step.h + step.rstd + self.mlp.saved_bytes()
        return total

    def _saves_first_input(self) -> bool:
        """Whether the first layer's input is kept: it has no gradient, but its norm may be computed again of
        it."""
        return self.step.saves_input or self.step.options.rebuild_norms

    def _attention_saved(self) -> int:
        step = self.step
        heads = step.q + 2 * step.k + (step.q + step.k if step.fused_qkv else 0)
        extra = step.shape.extra_norms * (step.h + step.rstd)
        u = step.q + 2 * step.k + step.h if step.options.dora else 0
        norms = self._head_norms()
        return (
            heads + norms + extra + u + step.q + step.lse + step.xa("qkv") + step.xa("o") + score_bytes(step)
        )

    def _head_norms(self) -> int:
        """What norms of queries and keys keep."""
        return self.step.q + self.step.k + self._head_rstd() if self.step.shape.query_norms else 0

    def _head_rstd(self) -> int:
        return 4 * self.step.m * (self.step.shape.heads + self.step.shape.kv_heads)

    def _set_saved(self, layers: int) -> None:
        per, first = self.saved_of_layer(), self.saved_of_layer(first=True)
        total = first + (layers - 1) * per if layers else 0
        self.ledger.keep(_SAVED, total, f"{layers} layers × what a layer saves", _SAVED)

    def _save(self, layer: int) -> None:
        """The layer's pieces become part of what all layers have saved."""
        self.ledger.free("x", "n1", "rstd1", "q", "kr", "v", "out", "lse", "xa_qkv", "xa_o", "u_qkv", "u_o")
        self.ledger.free("s", "n2", "rstd2", "q0", "k0", "rstd_heads", "extra_norms", "scores", "qkv")
        self.mlp.release()
        self.branches.release()
        self._set_saved(layer + 1)

    def _set_checkpoints(self, layers: int, on_their_way: int = 0) -> None:
        """Of the first `layers` layers, with what adapters around them keep; the input of the one at work is
        counted there."""
        step = self.step
        kept = step.options.kept(self.layers)
        on_device = max(0, layers - (self.layers - kept))
        self.ledger.keep("checkpoints", on_device * step.h, f"{on_device} layers' inputs × h", "checkpoints")
        around = layers * self.branches.saved_bytes() if self.branches.outside else 0
        self.ledger.keep("adapters' inputs", around, f"{layers} layers × (h + tokens·R)", "checkpoints")
        moving = on_their_way * step.h
        self.ledger.keep("checkpoints on their way", moving, f"{on_their_way} × h", "checkpoints")

    def _written_late(self, layers: int) -> int:
        """Inputs that wait for the thread that writes the file; pinned memory is filled before the next layer
        ends."""
        if not self.step.card.is_gpu:
            return 0
        return min(2, layers, self.step.options.on_disk(self.layers))

    def _fetched_early(self, layer: int) -> int:
        """In backward the last layer that is away comes while a later one is at work; for the last layer none
        does."""
        return 1 if self.step.options.away(self.layers) and 1 <= layer < self.layers - 1 else 0

    # ---- attention

    def attention_forward(self, phase: str, saved: bool) -> None:
        step, ledger, shape = self.step, self.ledger, self.step.shape
        u = step.q + 2 * step.k if step.options.dora else 0
        ledger.make(phase, "input norm", n1=(step.h, "h"), rstd1=(step.rstd, "4 B"))
        qkv = (
            {"qkv": (step.q + 2 * step.k, "q + 2k")}
            if step.fused_qkv
            else {"q0": (step.q, "q"), "k0": (step.k, "k"), "v": (step.k, "k")}
        )
        scratch = step.ops.forward(step.members("qkv"), step.m), "a slab of decoded weights"
        ledger.make(
            phase, "q, k, v", scratch=scratch, **qkv, xa_qkv=(step.xa("qkv"), "r each"), u_qkv=(u, "q + 2k")
        )
        if not saved:
            ledger.free("xa_qkv", "u_qkv", "rstd1")
        if shape.query_norms:
            ledger.make(
                phase,
                "norms of q and k",
                qn=(step.q, "q"),
                kn=(step.k, "k"),
                rstd_heads=(self._head_rstd(), ""),
            )
            if not saved:
                ledger.free("q0", "k0", "rstd_heads")
        ledger.make(phase, "rotation", q=(step.q, "q"), kr=(step.k, "k"))
        ledger.free(*(("qn", "kn") if shape.query_norms else ("q0", "k0")))
        work = forward_workspace(step, saved=saved), "scores at work"
        rows, scores = (step.lse, "4·heads"), (score_bytes(step), "S²·heads")
        ledger.make(phase, "attention", scratch=work, out=(step.q, "q"), lse=rows, scores=scores)
        if not saved:
            ledger.free("lse", "scores")
        u = step.h if step.options.dora else 0
        scratch = step.ops.forward(step.members("o"), step.m), "a slab of decoded weights"
        ledger.make(phase, "o", scratch=scratch, o_y=(step.h, "h"), xa_o=(step.xa("o"), "r"), u_o=(u, "h"))
        if not saved:
            ledger.free("xa_o", "u_o", "n1", "q", "kr", "v", "qkv", "out")
        self.branches.forward(phase, "attention", saved=saved)
        extra = shape.extra_norms * (step.h + step.rstd)
        if saved and extra:
            ledger.make(phase, "further norms", extra_norms=(extra, "h each"))
        ledger.make(phase, "second norm", s=(step.h, "h"), n2=(step.h, "h"), rstd2=(step.rstd, "4 B"))
        if saved and not step.keeps_norm("qkv"):
            ledger.free("n1")
        if extra and not saved:  # its norm's result has taken the place of it
            ledger.free("o_y")

    def attention_backward(self) -> None:
        step, ledger, phase = self.step, self.ledger, "attention_backward"
        options = step.options
        self.branches.backward("attention")
        scratch = step.ops.backward(step.members("o"), step.m), "a slab and partial sums"
        self._gradients("o")
        ledger.make(phase, "o", scratch=scratch, d_out=(step.q, "q"))
        self.branches.end_of_gradient("attention", "output")
        ledger.free("xa_o", "u_o", "extra_norms", *(("out",) if step.shape.dense_attention else ()))
        work = attention_workspace(step), f"{options.attention} attention's own"
        pieces = {"dq": (step.q, "q"), "dk": (step.k, "k"), "dv": (step.k, "k")}
        prefix = step.layer_gradient if step.options.prefix else 0
        ledger.make(phase, "attention", scratch=work, **pieces, d_prefix=(prefix, "the prefix's"))
        ledger.free("q", "kr", "v", "qkv", "out", "lse", "scores", "d_out")
        self._prefix_gradient()
        ledger.make(phase, "rotation", dq0=(step.q, "q"), dk0=(step.k, "k"))
        ledger.free("dq", "dk")
        if step.shape.query_norms:
            ledger.make(phase, "norms of q and k", dqn=(step.q, "q"), dkn=(step.k, "k"))
            ledger.free("dq0", "dk0", "q0", "k0", "rstd_heads")
        if step.again("qkv"):
            ledger.make(phase, "input norm again", n1=(step.h, "h"))
        if step.fused_qkv:
            ledger.make(phase, "q, k, v together", dqkv=(step.q + 2 * step.k, "q + 2k"))
            ledger.free("dq0", "dk0", "dv")
        scratch = step.ops.backward(step.members("qkv"), step.m), "a slab and partial sums"
        self._gradients("qkv")
        ledger.make(phase, "q, k, v", scratch=scratch, dn1=(step.h, "h"))
        ledger.free("dq0", "dk0", "dv", "dqn", "dkn", "dqkv", "n1", "xa_qkv", "u_qkv")
        self.branches.end_of_gradient("attention", "input")
        ledger.make(phase, "input norm", dx=(step.h, "h"))
        ledger.free("ds", "dn1", "x", "rstd1")

    def _prefix_gradient(self) -> None:
        """That of all layers' parameter, which each layer gives whole: beside it are the sum of the layers
        behind, and the new one; behind the last layer there is none. Later batches add it to theirs."""
        step, ledger, whole = self.step, self.ledger, self.layers * self.step.layer_gradient
        if not step.options.prefix:
            return
        beside = 2 * whole if ledger.bytes_of("gradients") else step.layer_gradient
        if step.options.accumulation == 1:
            ledger.keep("gradients", whole, "the prefix's elements", "gradients")
        else:
            beside = 3 * whole
        ledger.free("d_prefix")
        ledger.note("attention_backward", "the prefix", (beside, "the prefix's elements"))

    def _gradients(self, part: str) -> None:
        """Those of a part join the others; of a second batch they are added and go."""
        self.mlp.gradients(part)

    def _masks_go(self) -> bool:
        """Whether forward's masks are there for forward alone: eager attention does not save them."""
        return self.step.shape.dense_attention and not self.step.options.checkpointing

    # ---- loss

    def loss(self) -> None:
        step, ledger = self.step, self.ledger
        ledger.group = "loss"
        ledger.make("forward", "last norm", nf=(step.h, "h"), rstd_f=(step.rstd, "4 B"))
        ledger.free("embedded tokens", *(("masks",) if self._masks_go() else ()))
        if step.options.fused_loss:
            size = step.ops.loss(step.m, step.shape.vocab, step.options.loss_tile)
            tile = size, f"{size // (step.shape.vocab * step.ops.logit_bytes)} rows × V"
            ledger.make(
                "loss",
                "linear and cross-entropy",
                scratch=tile,
                d_nf=(step.h, "h"),
                losses=(8 * step.m, "8 B"),
            )
        else:
            logits = step.m * step.shape.vocab
            ledger.make(
                "loss",
                "logits",
                logits=(logits * step.e, "tokens·V"),
                wide=(2 * 4 * logits, "2·4 B·tokens·V"),
            )
            ledger.free("logits", "wide")
            ledger.make("loss", "its gradient", d_nf=(step.h, "h"))
        ledger.free("nf")

    # ---- backward

    def backward(self) -> None:
        step, ledger = self.step, self.ledger
        ledger.group = _LAYER
        ledger.make("mlp_backward", "last norm", dx=(step.h, "h"))
        ledger.free("d_nf", "losses", "x", "rstd_f")
        for layer in reversed(self._strides()):
            self._shrink(layer)
            self._layer_backward(layer)

    def _shrink(self, layer: int) -> None:
        """What is left when `layer` is at work: the layers behind it have gradients now and nothing saved."""
        step, ledger = self.step, self.ledger
        if step.options.accumulation == 1:
            layers = (
                self.layers if step.options.prefix and layer < self.layers - 1 else self.layers - 1 - layer
            )
            behind = layers * step.layer_gradient // step.options.cards
            ledger.keep("gradients", behind, f"adapters' elements of {layers} layers", "gradients")
        if not step.options.checkpointing:
            self._set_saved(layer)
            self._restore(layer)
            self._around_backward()
            return
        self._set_checkpoints(layer, self._fetched_early(layer))
        ledger.group = _LAYER
        ledger.hold(_renamed(name, nbytes, "", _LAYER) for name, nbytes in self._around().items())
        self._around_backward()
        ledger.hold([_renamed("x", step.h, "h", _LAYER)])
        self.attention_forward("mlp_backward", saved=True)
        self.mlp.forward("mlp_backward", saved=True)
        ledger.free("o_y", "mlp_y", "x_next")

    def _around(self) -> dict[str, int]:
        """What an adapter around a layer keeps."""
        return self.branches.saved() if self.branches.outside else {}

    def _around_backward(self) -> None:
        """Of an adapter around a layer, before the layer's own: the gradient of what it gave becomes that of
        the layer's output."""
        if not self.branches.outside:
            return
        self.branches.backward("mlp")
        self.ledger.free("dx", "d_mlp")
        self.ledger.hold([_renamed("dx", self.step.h, "h", _LAYER)])

    def _restore(self, layer: int) -> None:
        """The last layer's saved pieces under their own names."""
        step, ledger = self.step, self.ledger
        pieces = {
            "x": step.h if layer or self._saves_first_input() else 0,
            "rstd1": step.rstd,
            "n1": step.h if step.keeps_norm("qkv") else 0,
            "q": step.q,
        }
        pieces |= {"kr": step.k, "v": step.k, "out": step.q, "lse": step.lse, "xa_qkv": step.xa("qkv")}
        if step.fused_qkv:
            pieces |= {"v": 0, "qkv": step.q + 2 * step.k}
        if step.shape.query_norms:
            pieces |= {"q0": step.q, "k0": step.k, "rstd_heads": self._head_rstd()}
        if step.options.dora:
            pieces |= {"u_qkv": step.q + 2 * step.k, "u_o": step.h}
        pieces |= {"extra_norms": step.shape.extra_norms * (step.h + step.rstd), "scores": score_bytes(step)}
        pieces |= {"xa_o": step.xa("o"), "s": step.h, "rstd2": step.rstd}
        for name, nbytes in (pieces | self.mlp.saved() | self.branches.saved()).items():
            if nbytes:
                ledger.hold([_renamed(name, nbytes, "", _LAYER)])

    def _layer_backward(self, layer: int) -> None:
        ledger = self.ledger
        self.mlp.backward()
        ledger.group = _LAYER
        ledger.make("mlp_backward", "second norm", ds=(self.step.h, "h"))
        ledger.free("dn2", "dx", "s", "rstd2")
        self.attention_backward()


def _renamed(name: str, nbytes: int, formula: str, group: str):
    from .ledger import Part

    return Part(name, nbytes, formula=formula, group=group)
