"""The Python part of a patched call: opcodes executed, which no machine's noise touches, the median wall
time, and that of calls whose kernels do nothing, which is Python and torch alone.

    python -m benchmarks.bench_python_time [--baseline CHECKOUT] [--functions ROW] [--gpu]

A decoder layer of width 64 (NF4 and LoRA) is called without gradients, and each of its parts, on 1 and 512
tokens; "trained" linears forward and backward. `stock` is the same layer unpatched: what transformers' own
decorators take is in every row of its column. With --baseline the same is
done with another checkout's package, in processes of its own that take turns; --functions shows which
functions a row's opcodes are executed in. --gpu: of a GPU's calls once they are recorded, on this CPU, every
launch replaced by nothing; allocations and torch's products are made.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT, ROUNDS, CALLS = Path(__file__).resolve().parents[1], 5, 40


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--baseline", type=Path, help="another checkout, built, to compare with")
    parser.add_argument("--functions", metavar="ROW", help='the functions of one row, such as "norm M=1"')
    parser.add_argument("--gpu", action="store_true", help="a GPU's calls, without one and without launches")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.functions:
        calls = _calls(patched=True)
        if arguments.functions not in calls:
            parser.error(f"--functions: got {arguments.functions!r}, expected one of {', '.join(calls)}")
        for where, count in _opcodes(calls[arguments.functions]).most_common(40):
            print(f"{count:6} {where}")
    elif arguments.json:
        print(json.dumps(_measured_launches() if arguments.gpu else _measured()))
    else:
        paths = {"here": ROOT} | ({"baseline": arguments.baseline.resolve()} if arguments.baseline else {})
        found: dict[str, list[dict[str, dict[str, Any]]]] = {name: [] for name in paths}
        for _ in range(ROUNDS):
            for name, path in paths.items():
                found[name].append(_in_process(path, arguments.gpu))
        _show_launches(found) if arguments.gpu else _show(found)


def _show_launches(found: dict[str, list[dict[str, dict[str, Any]]]]) -> None:
    for row in found["here"][0]:
        for name, rounds in found.items():
            print(f"{row:24} {name:9} {statistics.median(each[row]['us'] for each in rounds):8.1f} us")


def _show(found: dict[str, list[dict[str, dict[str, Any]]]]) -> None:
    for row in found["here"][0]:
        for name, rounds in found.items():
            first, whole, alone = (
                rounds[0][row],
                *(statistics.median(each[row][what] for each in rounds) for what in ("us", "python_us")),
            )
            print(
                f"{row:21} {name:9} {first['opcodes']:6} opcodes (stock {first['stock']:6}) "
                f"{whole:8.1f} us, without kernels {alone:8.1f}"
            )


def _in_process(path: Path, gpu: bool) -> dict[str, dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if gpu else {}
    done = subprocess.run(
        [sys.executable, __file__, "--json", *(["--gpu"] if gpu else [])],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=path,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _measured() -> dict[str, dict[str, Any]]:
    stock, patched = _calls(patched=False), _calls(patched=True)
    with _kernels_that_do_nothing():
        alone = {row: _microseconds(call) for row, call in _calls(patched=True).items()}
    return {
        row: {
            "opcodes": _opcodes(call).total(),
            "stock": _opcodes(stock[row]).total(),
            "us": _microseconds(call),
            "python_us": alone[row],
        }
        for row, call in patched.items()
    }


def _measured_launches() -> dict[str, dict[str, Any]]:
    from peftkern import use_backend
    from peftkern.runtime import backends, replay

    replay._on_gpu, replay._current_device = (lambda first: True), (lambda: -1)
    backends._check_forced = lambda name, device: None  # of a forced backend alone
    parts = ("o_proj", "mlp", "o_proj trained", "mlp trained")
    rows = [f"{part} M={m}" for m in (1, 512) for part in parts]
    with use_backend("triton"), _launches_that_do_nothing():
        calls = _calls(patched=True)
        for row in rows:
            for _ in range(4):  # met, recorded, replayed, found without a look at what is held
                calls[row]()
        return {row: {"us": _microseconds(calls[row])} for row in rows}


@contextlib.contextmanager
def _launches_that_do_nothing() -> Iterator[None]:
    """A launch is told to the record as that of a compiled kernel, which does nothing."""
    from peftkern.runtime import launch, record

    class Nothing:
        def __getitem__(self, programs: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *values, stream=None: None

    def run(call: Any) -> None:
        record.launched(call, Nothing(), list(call.arguments.values()))

    importlib.import_module("peftkern.ops.linear.group.gpu")
    importlib.import_module("peftkern.ops.glu.triton")
    holders = [m for m in list(sys.modules.values()) if getattr(m, "run", None) is launch.run]
    original = launch.run
    try:
        for module in holders:
            module.run = run
        yield
    finally:
        for module in holders:
            module.run = original


def _calls(*, patched: bool) -> dict[str, Callable[[], Any]]:
    """By row, a call of the layer or of a part of it."""
    layer, rotary = _layer(patched)
    calls: dict[str, Callable[[], Any]] = {}
    for tokens in (1, 512):
        x = torch.randn(1, tokens, 64)
        at = rotary(x, torch.arange(tokens)[None])
        calls |= {
            f"norm M={tokens}": lambda x=x: layer.input_layernorm(x),
            f"o_proj M={tokens}": lambda x=x: layer.self_attn.o_proj(x),
            f"mlp M={tokens}": lambda x=x: layer.mlp(x),
            f"attention M={tokens}": lambda x=x, at=at: layer.self_attn(x, position_embeddings=at),
            f"layer M={tokens}": lambda x=x, at=at: layer(x, position_embeddings=at),
        }
    calls = {row: _without_gradients(call) for row, call in calls.items()}
    attention = layer.self_attn
    for tokens in (1, 512):
        x = torch.randn(1, tokens, 64, requires_grad=True)
        siblings = attention.q_proj, attention.k_proj, attention.v_proj
        calls |= {
            f"o_proj trained M={tokens}": _trained(x, [attention.o_proj]),
            f"q, k, v trained M={tokens}": _trained(x, siblings),
            f"mlp trained M={tokens}": _trained(x, [layer.mlp]),
            f"norm trained M={tokens}": _trained(x, [layer.input_layernorm]),
        }
    return calls


def _trained(x: torch.Tensor, linears: Sequence[torch.nn.Module]) -> Callable[[], Any]:
    """Forward and backward."""
    grads = [torch.randn_like(linear(x)) for linear in linears]
    return lambda: torch.autograd.backward([linear(x) for linear in linears], grads)


@contextlib.contextmanager
def _kernels_that_do_nothing() -> Iterator[None]:
    """For layers that are patched inside: what a call has prepared may hold kernels."""
    extension = importlib.import_module("peftkern._C")
    names = ("linear", "lora", "group", "norm", "rope", "glu", "attention")
    kernels = {
        name: getattr(extension, name)
        for name in vars(extension)
        if name.endswith(("_fwd", "_bwd", "rope")) and any(part in name for part in names)
    }
    try:
        for name in kernels:
            setattr(extension, name, lambda *_: None)
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(extension, name, kernel)


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _layer(patched: bool) -> tuple[Any, Any]:
    import bitsandbytes as bnb
    import peft
    import transformers

    torch.manual_seed(0)
    sizes = dict(
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        num_hidden_layers=1,
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    for parent in [m for m in model.modules() if type(m).__name__ in ("LlamaMLP", "LlamaAttention")]:
        for name, linear in list(parent.named_children()):
            if isinstance(linear, torch.nn.Linear):
                base = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, quant_type="nf4"
                )
                base.load_state_dict(linear.state_dict())
                setattr(parent, name, base.to("cpu"))
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0)
    ).eval()
    if patched:
        import peftkern

        peftkern.patch(model)
    inner = model.base_model.model.model
    return inner.layers[0], inner.rotary_emb


def _opcodes(call: Callable[[], Any]) -> collections.Counter[str]:
    """How many the third call executes, by function."""
    counts: collections.Counter[str] = collections.Counter()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        frame.f_trace_opcodes = True
        if event == "opcode":
            counts[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
        return trace

    call(), call()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return counts


def _microseconds(call: Callable[[], Any]) -> float:
    """The median of calls one by one."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


if __name__ == "__main__":
    main()
