"""Configurations of bottleneck adapters, by this package's words and by AdapterHub's."""

from __future__ import annotations

from typing import Any

import pytest

from peftkern.adapters.bottleneck import BottleneckConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "double_seq_bn",
            dict(
                places=("attention", "mlp"),
                reads="output",
                activation="silu",
                reduction_factor=16.0,
                init="houlsby",
            ),
        ),
        ("seq_bn", dict(places=("mlp",), reads="sum", activation="relu", reduction_factor=16.0)),
        (
            "par_bn",
            dict(
                places=("mlp",),
                reads="input",
                activation="relu",
                reduction_factor=2.0,
                scaling=4.0,
                init="mam_adapter",
            ),
        ),
        ("scaled_par_bn", dict(places=("mlp",), reads="input", scaling="learned")),
        ("houlsby", dict(places=("attention", "mlp"), reads="output")),
        ("pfeiffer", dict(places=("mlp",), reads="sum")),
        ("seq_bn[reduction_factor=8, leave_out=[0, 1]]", dict(reduction_factor=8, leave_out=(0, 1))),
        (
            "double_seq_bn[non_linearity=gelu_new,mh_adapter=False]",
            dict(places=("mlp",), activation="gelu_tanh"),
        ),
        ("seq_bn[reduction_factor={'0': 8, 'default': 32}]", dict(reduction_factor={"0": 8, "default": 32})),
        ("seq_bn[original_ln_before=False,size=24]", dict(reads="output", size=24)),
        (
            "par_bn[scaling=channel,cross_adapter=True]",
            dict(scaling="channel", places=("cross_attention", "mlp")),
        ),
    ],
)
def test_names_and_options(text: str, expected: dict[str, Any]) -> None:
    config = BottleneckConfig.parse(text)
    assert {key: getattr(config, key) for key in expected} == expected
    assert BottleneckConfig(**config.to_dict()) == config


def test_adapterhubs_whole_dictionary_is_understood() -> None:
    # DoubleSeqBnConfig(reduction_factor=4).to_dict() of adapters 1.3
    values = dict(
        mh_adapter=True,
        output_adapter=True,
        reduction_factor=4,
        non_linearity="swish",
        original_ln_before=False,
        original_ln_after=True,
    )
    values |= dict(
        ln_before=False,
        ln_after=False,
        init_weights="bert",
        is_parallel=False,
        scaling=1.0,
        use_gating=False,
        leave_out=[2],
    )
    values |= dict(
        residual_before_ln=True,
        adapter_residual_before_ln=False,
        inv_adapter=None,
        inv_adapter_reduction_factor=None,
    )
    values |= dict(
        cross_adapter=False,
        dropout=0.0,
        phm_layer=False,
        phm_dim=4,
        factorized_phm_W=True,
        shared_W_phm=False,
    )
    values |= dict(
        shared_phm_rule=True,
        factorized_phm_rule=False,
        phm_c_init="normal",
        phm_init_range=0.0001,
        learn_phm=True,
    )
    values |= dict(
        hypercomplex_nonlinearity="glorot-uniform", phm_rank=1, phm_bias=True, stochastic_depth=0.0
    )
    config = BottleneckConfig.from_adapterhub(values)
    assert config == BottleneckConfig(reduction_factor=4, init="bert", leave_out=(2,))


def test_size_by_layer() -> None:
    config = BottleneckConfig(reduction_factor={"0": 8, "default": 4})
    assert (config.size_at(0, 64), config.size_at(5, 64)) == (8, 16)
    assert BottleneckConfig(reduction_factor=1000).size_at(0, 64) == 1
    assert BottleneckConfig(size=7).size_at(3, 64) == 7
    with pytest.raises(ValueError, match="names neither layer 1 nor a 'default'"):
        BottleneckConfig(reduction_factor={0: 8}).size_at(1, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq_bm", "got the name 'seq_bm', expected one of double_seq_bn"),
        ("compacter", "'compacter' is AdapterHub's name of adapters whose matrices are Kronecker products"),
        ("seq_bn[reduction=8]", "unknown keys reduction"),
        ("seq_bn[8]", "got '8' between the brackets, expected key=value"),
        ("seq_bn[ln_after=True]", "ln_after: only False is built here"),
        ("seq_bn[", "expected NAME or NAME"),
        ("seq_bn[reduction_factor=0]", "reduction_factor: got 0, expected numbers greater than 0"),
        ("seq_bn[non_linearity=selu]", "activation: got 'selu', expected one of"),
        ("seq_bn[scaling=big]", "scaling: got 'big', expected a number, 'learned' or 'channel'"),
        ("seq_bn[output_adapter=False]", "places: got"),
        ("seq_bn[dropout=1]", "dropout: got 1, expected at least 0 and less than 1"),
        ("seq_bn[leave_out=[-1]]", r"leave_out: got \[-1\]"),
        ("seq_bn[size=0]", "size: got 0, expected a whole number of at least 1"),
    ],
)
def test_what_is_not_understood_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckConfig.parse(text)
