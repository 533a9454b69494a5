"""Gradual unfreezing as a pure function of the global step: a run that is killed and resumed trains what the
unbroken one trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .depth import parameter_depths
from .first_layer import BackwardStop

__all__ = ["GradualUnfreezing", "UnfreezingPlan"]


@dataclass(frozen=True)
class UnfreezingPlan:
    """From which step on which depths are trained.

    stages: (step, depth), steps rising from 0, depths falling; from that step on, parameters of that depth or
        more are trained.

    >>> plan = UnfreezingPlan.every(10, [3, 4, 5])
    >>> [plan.lowest(step) for step in (0, 9, 10, 25, 1000)]
    [5, 5, 4, 3, 3]
    """

    stages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        steps, depths = [step for step, _ in self.stages], [depth for _, depth in self.stages]
        if not self.stages or steps[0] != 0:
            raise ValueError(f"stages: got {self.stages}, expected a first stage at step 0")
        if sorted(set(steps)) != steps or sorted(set(depths), reverse=True) != depths:
            raise ValueError(f"stages: got {self.stages}, expected rising steps and falling depths")

    @classmethod
    def every(cls, steps: int, depths: Iterable[int]) -> UnfreezingPlan:
        """The largest of `depths` from the first step, and one more after each `steps` steps (ULMFiT: an
        epoch)."""
        if steps < 1:
            raise ValueError(
                f"steps: got {steps}, expected the number of steps between two stages, 1 or more",
            )
        return cls(
            tuple((index * steps, depth) for index, depth in enumerate(sorted(set(depths), reverse=True))),
        )

    @classmethod
    def parse(cls, text: str, depths: Iterable[int]) -> UnfreezingPlan:
        """What --unfreeze says: "10" is one more of the `depths` every 10 steps; "24:0,12:40" is layers from
        24 up at once, from 12 up at step 40.

        Raises ValueError that tells which part is wrong, and where the last stage leaves some of `depths`
        frozen.
        """
        if text.strip().isdigit():
            return cls.every(int(text), depths)
        stages = []
        for part in text.split(","):
            layer, colon, step = part.partition(":")
            if not (colon and layer.strip().isdigit() and step.strip().isdigit()):
                raise ValueError(
                    f"{part.strip()!r} is neither a number of steps (10) nor LAYER:STEP (24:0,12:40)",
                )
            stages.append((int(step), int(layer) + 1 if int(layer) else 0))
        plan = cls(tuple(stages))
        if plan.stages[-1][1] > min(depths):
            raise ValueError(
                f"{text!r} never trains what lies below layer {plan.stages[-1][1] - 1}: add a stage that goes"
                " lower"
            )
        return plan

    def lowest(self, step: int) -> int:
        """The smallest depth that is trained in the update number `step` (from 0)."""
        return max(stage for stage in self.stages if stage[0] <= step)[1]

    @property
    def last_step(self) -> int:
        """The step from which on everything is trained."""
        return self.stages[-1][0]


class GradualUnfreezing:
    """A plan at work on a model: `apply(step)` before each update, `remove` at the end.

    Build the optimizer first, of all that is ever trained: its groups then stay the same, and what is frozen
    has no gradient, which torch's optimizers skip; Adam's bias correction begins with a parameter's first
    update. Below the lowest trained layer no backward runs.

    Raises: ValueError where the first stage would train nothing, or the last one leaves a parameter out.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: UnfreezingPlan,
        *,
        depths: Mapping[str, int] | None = None,
    ) -> None:
        depths = parameter_depths(model) if depths is None else depths
        self.plan = plan
        self._held = [
            (parameter, depths[name])
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        trained = {depth for _, depth in self._held}
        if not trained or plan.stages[0][1] > max(trained):
            raise ValueError(
                f"plan: at step 0 it trains from depth {plan.stages[0][1]}, but the model's trainable depths"
                f" are {trained}"
            )
        if plan.stages[-1][1] > min(trained):
            raise ValueError(
                f"plan: it never trains depth {min(trained)}, which is trainable: add a stage or freeze it",
            )
        self._stop = BackwardStop(model, 0)
        self._lowest: int | None = None

    def apply(self, step: int) -> int:
        """Let require gradients what update number `step` (from 0) trains, and nothing else; returns the
        smallest depth trained."""
        lowest = self.plan.lowest(step)
        if lowest != self._lowest:
            for parameter, depth in self._held:
                parameter.requires_grad_(depth >= lowest)
            trained = min(depth for _, depth in self._held if depth >= lowest)
            self._stop.move(max(0, trained - 1))
            self._lowest = lowest
        return lowest

    def remove(self) -> None:
        """Let everything be trainable again that was."""
        self._stop.remove()
        for parameter, _ in self._held:
            parameter.requires_grad_(True)
        self._lowest = None
