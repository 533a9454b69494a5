"""What an attention's forward does between its projections: the usual form is recognized, and no other."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import pytest
from torch import nn

from peftkern.patching import attention_form
from peftkern.patching.attention_form import CACHES

from . import models
from .versions import COUNTED
from .whole import BF16

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def forward_of() -> type:
    """A class of attention like Llama's, whose source `_with` changes."""

    class Attention(transformers.models.llama.modeling_llama.LlamaAttention):
        def forward(self, hidden_states, position_embeddings=None, attention_mask=None, cache=None, **kwargs):
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
            key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
            value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
            cos, sin = position_embeddings
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            dropout = 0.0 if not self.training else self.attention_dropout
            out, weights = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
            return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    return Attention


apply_rotary_pos_emb = eager_attention_forward = ALL_ATTENTION_FUNCTIONS = None  # looked up by the forwards


def _with(old: str, new: str) -> nn.Module:
    """Llama's attention, its class's forward as above with a piece of its source replaced."""
    source = textwrap.dedent(inspect.getsource(forward_of))
    start = source.index("def forward(")
    body = textwrap.dedent(" " * 8 + source[start : source.index("    return Attention")])
    assert body.count(old) == 1, old
    scope: dict[str, Any] = {
        "apply_rotary_pos_emb": None,
        "ALL_ATTENTION_FUNCTIONS": None,
        "eager_attention_forward": None,
    }
    exec(body.replace(old, new), scope)
    module = models.llama(BF16).model.layers[0].self_attn
    module.__class__ = type("Attention", (type(module),), {"forward": scope["forward"]})
    return module


def test_the_usual_form_is_recognized() -> None:
    form = attention_form.attention_form(_with("cos, sin =", "cos, sin ="))
    assert form.cache == "cache" and {"head_dim", "scaling", "config", "training"} <= set(form.reads)
    assert form.further == frozenset()
    window = "sliding_window=getattr(self.config, 'sliding_window', 7), **kwargs\n    )"
    wide = _with("**kwargs\n    )", window)
    assert attention_form.attention_form(wide).further == {"sliding_window"}
    if COUNTED:
        assert attention_form.attention_form(models.llama(BF16).model.layers[0].self_attn).cache in CACHES


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("query, key = apply", "key, query = apply"),
        ("cos, sin = position", "sin, cos = position"),
        ("self.k_proj(hidden_states)", "self.q_proj(hidden_states)"),
        ("scaling=self.scaling", "scaling=self.head_dim"),
        ("query, key, value, attention_mask", "query, key, key, attention_mask"),
        ("value, attention_mask, dropout", "value, None, dropout"),
        ("dropout=dropout", "dropout=0.0"),
        ("self.layer_idx)", "0 * self.layer_idx + 7)"),
        ("out.reshape", "query.reshape"),
        ("transpose(1, 2)\n    key =", "transpose(1, 2) * 2\n    key ="),
        ("return self.o_proj", "return self.head_dim * self.o_proj"),
        (", **kwargs\n    )", "\n    )"),
        ("cos, sin = ", "hidden_states = hidden_states.clone()\n    cos, sin = "),
        ("cache=None, **kwargs", "cache=None, gate=None, **kwargs"),
    ],
    ids=str,
)
def test_another_form_is_not(old: str, new: str) -> None:
    assert attention_form.attention_form(_with(old, new)) is None
