"""Gradient reversal, its schedule, the discriminator, and the probe after the fact."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from torch.nn import functional as F

from peftkern.finetune.errors import InputError
from peftkern.transfer.dann import DANNLoss, annealed_rate, domain_probe, reversal_weight, reverse_gradient


def test_schedules_are_the_paper_s_and_of_the_step_alone() -> None:
    for progress in (0.0, 0.03, 0.25, 0.5, 1.0):
        assert reversal_weight(progress) == pytest.approx(2 / (1 + math.exp(-10 * progress)) - 1, abs=1e-15)
        assert annealed_rate(progress) == pytest.approx(1 / (1 + 10 * progress) ** 0.75, abs=1e-15)
    assert reversal_weight(0) == 0 and reversal_weight(1) > 0.9999 and annealed_rate(0) == 1
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress: got"):
            reversal_weight(progress)


def test_reversal_is_the_identity_forward_and_minus_the_weight_backward() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    (dx,) = torch.autograd.grad((y**2).sum(), x)
    assert torch.equal(dx, -0.3 * (2 * x))


@pytest.mark.parametrize("progress", [0.0, 0.1, 1.0])
def test_gradients_are_the_minimax_objective_s_in_fp64(progress: float) -> None:
    dann = DANNLoss(6, hidden=5, strength=0.5)
    source, target = torch.randn(7, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    loss = dann(source, target, progress=progress)
    grads = torch.autograd.grad(loss, [source, target, *dann.parameters()])
    # The same in fp64 by the definition: cross-entropies of the domains' labels.
    exact = [t.detach().double().requires_grad_() for t in (source, target)]
    weights = [p.detach().double().requires_grad_() for p in dann.parameters()]
    rows = torch.cat(exact)
    centred = rows - rows.detach().mean(0)
    hidden = centred / (centred.detach() ** 2).mean().sqrt()
    for i in (0, 2):
        hidden = torch.relu(hidden @ weights[i].t() + weights[i + 1])
    p = torch.sigmoid(hidden @ weights[4].t() + weights[5])[:, 0]
    labels = torch.cat([torch.ones(7), torch.zeros(4)]).double()
    each = F.binary_cross_entropy(p, labels, reduction="none")
    reference = each[:7].mean() / 2 + each[7:].mean() / 2
    wanted = torch.autograd.grad(reference, exact + weights)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    reversed_by = -0.5 * reversal_weight(progress)
    for i, (ours, theirs) in enumerate(zip(grads, wanted, strict=True)):
        # Only what reaches the features is reversed and scaled; the discriminator learns at full strength at
        # progress 0 too.
        expected = (reversed_by if i < 2 else 1.0) * theirs
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)


def test_a_domain_counts_half_whatever_its_rows() -> None:
    dann = DANNLoss(3)
    torch.nn.init.zeros_(dann.discriminator.layers[-1].weight)
    torch.nn.init.constant_(dann.discriminator.layers[-1].bias, 2.0)
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    for rows in (4, 40):
        assert dann(torch.randn(8, 3), torch.randn(rows, 3), progress=1.0).item() == pytest.approx(
            wanted, rel=1e-6
        )


def test_it_runs_in_fp32_under_autocast() -> None:
    dann = DANNLoss(3)
    features = torch.randn(8, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = dann(features, features.detach() + 1, progress=1.0)
    assert loss.dtype == torch.float32 and dann.discriminator(features).dtype == torch.float32
    loss.backward()
    assert features.grad.dtype == torch.bfloat16 and features.grad.norm() > 0


def test_features_of_any_size_are_the_same_to_it() -> None:
    dann, source, target = DANNLoss(4), torch.randn(32, 4), torch.randn(32, 4)
    loss = dann(source, target, progress=0.5).item()
    assert dann(500 + 300 * source, 500 + 300 * target, progress=0.5).item() == pytest.approx(loss, abs=1e-4)
    assert abs(loss - math.log(2)) < 0.1 and dann(torch.ones(4, 4), torch.ones(4, 4), progress=0.5).isfinite()


def test_its_weights_depend_on_its_seed_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = DANNLoss(4, seed=1), DANNLoss(4, seed=1), DANNLoss(4, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(one.parameters(), same.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)


def adapted(x: torch.Tensor, labels: torch.Tensor, *, align: bool) -> tuple[float, float]:
    """Of a linear encoder trained on x[0]: accuracy on x[1], and the domains' distance in standard
    deviations.
    """
    torch.manual_seed(0)
    encoder, head, dann = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2), DANNLoss(4, hidden=16)
    parameters = [*encoder.parameters(), *head.parameters(), *dann.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2, betas=(0.5, 0.999))
    for step in range(300):
        of_source, of_target = encoder(x[0]), encoder(x[1])
        loss = F.cross_entropy(head(of_source), labels[0])
        if align:
            loss = loss + dann(of_source, of_target, progress=step / 300)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        of_source, of_target = encoder(x[0]), encoder(x[1])
        distance = (of_source.mean(0) - of_target.mean(0)).norm() / of_source.std()
        return float((head(of_target).argmax(1) == labels[1]).float().mean()), float(distance)


def test_it_drops_what_tells_the_domains_apart_and_keeps_the_class() -> None:
    """The class in one coordinate, the domain in the other."""
    labels, noise = torch.randint(0, 2, (2, 400)), torch.randn(2, 400, 2)
    domain = torch.tensor([1.5, -1.5])[:, None].expand(2, 400)
    x = torch.stack([2.0 * labels - 1, domain], dim=2) + 0.3 * noise
    accuracy, distance = adapted(x, labels, align=True)
    assert accuracy > 0.95 and distance < 0.6 * adapted(x, labels, align=False)[1]


def test_probe_sees_what_a_linear_one_cannot() -> None:
    pytest.importorskip("sklearn", reason="sklearn is not installed")
    random = numpy.random.default_rng(0)
    angle = random.uniform(0, 2 * numpy.pi, (2, 150))
    rings = numpy.stack([numpy.cos(angle), numpy.sin(angle)], axis=2) * numpy.array([1.0, 2.0])[:, None, None]
    found = domain_probe(*rings)
    assert found.rows == 150 and found.linear.accuracy.mean < 0.65 and found.kernel.accuracy.mean > 0.95
    assert found.verdict.startswith("a fresh classifier still tells")
    same = domain_probe(random.normal(size=(90, 5)), random.normal(size=(150, 5)))
    assert same.rows == 90 and same.verdict.startswith("fresh classifiers cannot tell")


def test_bad_features_are_named() -> None:
    pytest.importorskip("sklearn", reason="sklearn is not installed")
    dann, good = DANNLoss(3), torch.randn(4, 3)
    for source, target, message in (
        (torch.randn(4, 2), good, r"source: got features of shape \(4, 2\), expected \[rows, 3\]"),
        (good, torch.randn(0, 3), r"target: got features of shape \(0, 3\)"),
        (good, good * math.nan, "target: got features that are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            dann(source, target, progress=0.5)
    with pytest.raises(InputError, match="fewer than 5 folds"):
        domain_probe(numpy.random.rand(3, 2), numpy.random.rand(9, 2))
    with pytest.raises(InputError, match="NaN or infinite"):
        domain_probe(numpy.full((9, 2), numpy.nan), numpy.random.rand(9, 2))
