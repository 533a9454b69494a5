"""The fused loss of models that do something to their logits, or with them: fused and equal, or stock and a
reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peftkern.patching.forwards import find
from peftkern.patching.logits import DeferredLogits, LogitForm
from peftkern.patching.loss import Loss

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from .rewriting import installed, surveyed  # noqa: E402
from .test_loss import COMMON, IDS, LABELS, fuse, make, run  # noqa: E402

Change = Callable[[Any], Any]


class Model(transformers.LlamaForCausalLM):
    """A Llama that changes its logits by `change`, and has an output of its own that `further` makes of the
    logits and the loss."""

    change: Change = staticmethod(lambda logits: logits)
    further: Callable[[Any, Tensor], Tensor] = staticmethod(lambda logits, loss: loss)
    options: dict[str, Any] = {}

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.change(self.lm_head(self.model(input_ids=input_ids).last_hidden_state))
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.shape[-1], **self.options, **kwargs
        )
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            loss=self.further(logits, loss), logits=logits
        )


def model(**functions) -> Model:
    torch.manual_seed(0)
    made = Model(transformers.LlamaConfig(**COMMON)).train()
    torch.nn.init.normal_(made.lm_head.weight, std=0.3)
    for name, function in functions.items():
        setattr(made, name, function)
    return made


def agree(ours: torch.nn.Module, stock: torch.nn.Module) -> None:
    got, expected = run(ours), run(stock)
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=name
        )


FUSED: dict[str, tuple[Change, LogitForm]] = {
    "a scale": (lambda u: u * 0.3, LogitForm(0.3)),
    "a scale from the left": (lambda u: 2 * u, LogitForm(2.0)),
    "a division": (lambda u: u / 4, LogitForm(0.25)),
    "in place": (lambda u: u.__imul__(3) if isinstance(u, Tensor) else u * 3, LogitForm(3.0)),
    "a cap": (lambda u: 5.0 * torch.tanh(u / 5.0), LogitForm(1.0, 5.0)),
    "a cap by other words": (lambda u: F.tanh(u.float() / 3) * 3, LogitForm(1.0, 3.0)),
    "a method": (lambda u: (u * 0.1).tanh() * 10, LogitForm(1.0, 10.0)),
    "a scale and a cap": (lambda u: torch.tanh(u * 2 / 5) * 5, LogitForm(2.0, 5.0)),
    "casts": (lambda u: u.contiguous().to(torch.float32).to(u.device), LogitForm()),
}
STOCK: dict[str, Change] = {
    "a bias": lambda u: u + torch.linspace(-1, 1, 96),
    "a polynomial": lambda u: u - u.square() * 0.01,
    "a mask that is written": lambda u: (u.__setitem__((..., slice(90, 96)), -50.0), u)[1],
    "masked_fill": lambda u: u.masked_fill(torch.arange(96) > 90, -50.0),
    "a scale that is a tensor": lambda u: u * torch.tensor(0.5),
    "a cap with another factor": lambda u: torch.tanh(u) * torch.tensor([2.0]),
    "two caps": lambda u: torch.tanh(torch.tanh(u) * 2) * 3,
    "a sign": lambda u: -u,
    "a negative scale": lambda u: u * -1.0,
    "an index": lambda u: u[..., torch.arange(95, -1, -1)],
    "log_softmax": lambda u: torch.log_softmax(u, -1) * 2,
    "fp64": lambda u: u.double(),
}


@pytest.mark.parametrize("what", FUSED)
def test_changes_with_a_fused_form(what: str, loss_calls: list) -> None:
    change, form = FUSED[what]
    ours = model(change=change)
    stock = copy.deepcopy(ours)
    plan = find(fuse(ours))[1].cache
    assert plan.form == pytest.approx(form)
    agree(ours, stock)
    assert len(loss_calls) == 1


@pytest.mark.parametrize("what", STOCK)
def test_changes_without_one(what: str, loss_calls: list) -> None:
    """The report says so; and should a model begin to do it after it was patched, the loss is the stock
    model's all the same."""
    ours = model(change=STOCK[what])
    (found,) = surveyed(ours, Loss())
    assert "no fused form" in found.row.reason and not installed(ours, Loss())
    later = fuse(model())
    later.change = STOCK[what]
    agree(later, ours)
    assert not loss_calls


USED = {
    "a z-loss": lambda u, loss: loss + 0.05 * u.logsumexp(-1).square().mean(),
    "an entropy": lambda u, loss: (
        loss - 0.1 * torch.distributions.Categorical(logits=u.float().contiguous()[:]).entropy().mean()
    ),
    "label smoothing": lambda u, loss: loss + 0.1 * -torch.nn.functional.log_softmax(u, -1).mean(),
    "their mean": lambda u, loss: loss + u.mean() * 0.2,
}


@pytest.mark.parametrize("what", USED)
def test_logits_that_are_used_beside_the_loss(what: str) -> None:
    ours = model(further=USED[what])
    (found,) = surveyed(ours, Loss())
    assert "uses the logits for more than its loss" in found.row.reason and not installed(ours, Loss())
    later = fuse(model())
    later.further = USED[what]
    agree(later, ours)


def test_a_loss_function_that_is_given_options(loss_calls: list) -> None:
    """transformers' own ignores what it does not know; one that does not must get it."""
    ours = model(options={"label_smoothing": 0.3})
    fuse(ours)
    agree(ours, model(options={"label_smoothing": 0.3}))
    assert not loss_calls


def test_a_change_of_the_configuration_is_followed(loss_calls: list) -> None:
    ours = make("gemma2")
    stock = copy.deepcopy(ours)
    fuse(ours)
    ours.config.final_logit_softcapping = stock.config.final_logit_softcapping = 2.0
    agree(ours, stock)
    ours.config.final_logit_softcapping = stock.config.final_logit_softcapping = None
    agree(ours, stock)
    assert [call["softcap"] for call in loss_calls] == [2.0, None]


class Wrapped(transformers.LlamaForCausalLM):
    """Makes its loss from the output of the forward that it overrides."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + output.logits.mean()
        return output


def test_a_forward_on_top_of_another() -> None:
    torch.manual_seed(0)
    (found,) = surveyed(wrapped := Wrapped(transformers.LlamaConfig(**COMMON)), Loss())
    assert found.row.got == "stock" and found.row.reason and not installed(wrapped, Loss())


class Bare(transformers.LlamaForCausalLM):
    """Returns no output of transformers, but what `form` makes of loss and logits."""

    form: Callable[[Tensor, Any], Any] = staticmethod(lambda loss, logits: (loss, logits))

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state)
        return self.form(self.loss_function(logits=logits, labels=labels, vocab_size=96, **kwargs), logits)


def test_outputs_of_another_kind() -> None:
    """A tuple gets its logits; a dictionary loses them, unless they were made already."""
    torch.manual_seed(0)
    ours = Bare(transformers.LlamaConfig(**COMMON)).train()
    expected = copy.deepcopy(ours)(input_ids=IDS, labels=LABELS)
    fuse(ours)
    got = ours(input_ids=IDS, labels=LABELS)
    assert type(got) is tuple and torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0])
    ours.form = lambda loss, logits: {"loss": loss, "logits": logits, "further": None}
    assert ours(input_ids=IDS, labels=LABELS).keys() == {"loss", "further"}
    ours.form = lambda loss, logits: {"loss": loss, "mean": logits.mean(), "logits": logits}
    assert torch.equal(ours(input_ids=IDS, labels=LABELS)["logits"], expected[1])


SMALL = dict(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
HEADS = dict(intermediate_size=128, num_attention_heads=4, max_position_embeddings=64)
ARCHITECTURES = {
    "RecurrentGemma": dict(
        **SMALL, **HEADS, lru_width=64, logits_soft_cap=3.0, block_types=["recurrent", "attention"]
    ),
    "ModernBertDecoder": dict(**SMALL, **HEADS, decoder_bias=False),
    "FalconH1": dict(
        **SMALL,
        **HEADS,
        num_key_value_heads=2,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
    ),
    "Cohere": dict(**SMALL, **HEADS, num_key_value_heads=2, logit_scale=0.0625),
    "Bamba": dict(
        **SMALL,
        **HEADS,
        num_key_value_heads=2,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_chunk_size=16,
        attn_layer_indices=[1],
        z_loss_coefficient=0.05,
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_that_name_it_otherwise(name: str, loss_calls: list) -> None:
    """Fused, or with a reason; equal in any case. Bamba's term made of logits keeps its stock loss."""
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    stock = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    ).train()
    torch.nn.init.normal_(stock.get_output_embeddings().weight, std=0.5)
    ours = copy.deepcopy(stock)
    (found,) = surveyed(ours, Loss())
    assert installed(ours, Loss()) == (found.row.reason is None) == (name != "Bamba"), found.row.reason
    agree(ours, stock)
    assert len(loss_calls) == (name != "Bamba")


def test_an_attribute_that_is_set_after_patching_is_followed() -> None:
    if not hasattr(transformers, "BambaForCausalLM"):
        pytest.skip("this transformers has no Bamba")
    torch.manual_seed(0)
    options = ARCHITECTURES["Bamba"] | {"z_loss_coefficient": 0.0}
    ours = transformers.BambaForCausalLM(transformers.BambaConfig(**options)).train()
    stock = copy.deepcopy(ours)
    fuse(ours)
    ours.z_loss_coefficient = stock.z_loss_coefficient = 0.05
    agree(ours, stock)


def test_negative_log_likelihood_is_that_of_the_logits_alone() -> None:
    """In either mode, whatever the model adds to its loss."""
    ours = make("mixtral", router_aux_loss_coef=0.5, output_router_logits=True)
    forward = find(fuse(ours))[1]
    expected = F.cross_entropy(
        ours(input_ids=IDS).logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="sum"
    )
    for mode in (True, False):
        ours.train(mode)
        torch.testing.assert_close(forward.negative_log_likelihood(input_ids=IDS, labels=LABELS), expected)
    assert forward.negative_log_likelihood(input_ids=IDS, labels=LABELS, return_dict=False) is None


def test_deferred_logits_pass_for_the_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(11, 8, generator=generator)
    tensor = F.linear(hidden, weight)

    def deferred() -> DeferredLogits:
        return DeferredLogits(lambda x: F.linear(x, weight), hidden, 11, torch.float32)

    uses: list[Change] = [
        *(change for change, _ in FUSED.values()),
        lambda u: u[0, :, 3:].sum(),
        lambda u: 1 - u,
        lambda u: (1 + u) ** 2 / 3.0,
        lambda u: torch.stack([u, u]).mean(0),
        lambda u: torch.ones(2, 3, 11) * u,
        lambda u: (u > 0).float() + abs(u),
        lambda u: u.mul_(2) + u,
        lambda u: u.view(-1, u.size(-1)).argmax(-1),
        lambda u: u.to(torch.float64) - u.float(),
        lambda u: u @ torch.ones(11, 2),
    ]
    for use in uses:
        got = use(deferred())
        got, expected = got.make() if isinstance(got, DeferredLogits) else got, use(tensor.clone())
        torch.testing.assert_close(got, expected)
    u = deferred()
    assert (
        u.shape == tensor.shape
        and u.size(1) == 3
        and u.dim() == u.ndim == 3
        and u.device == tensor.device
        and len(u) == 2
    )
    assert deferred().tensor is None and deferred().form() == LogitForm()
