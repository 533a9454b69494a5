"""Named weight shapes (out_features N, in_features K)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LARGE", "SMALL", "Shape"]


@dataclass(frozen=True)
class Shape:
    """One linear layer, and where it occurs."""

    n: int
    k: int
    where: str

    @property
    def name(self) -> str:
        return f"{self.n}x{self.k}"


Q_8B = Shape(4096, 4096, "Llama-3.1-8B q_proj and o_proj")
GATE_8B = Shape(14336, 4096, "Llama-3.1-8B gate_proj and up_proj")
GATE_135M = Shape(1536, 576, "SmolLM2-135M gate_proj and up_proj")
DOWN_135M = Shape(576, 1536, "SmolLM2-135M down_proj")
Q_135M = Shape(576, 576, "SmolLM2-135M q_proj and o_proj")
KV_135M = Shape(192, 576, "SmolLM2-135M k_proj and v_proj")
LARGE = (Q_8B, GATE_8B)
SMALL = (GATE_135M, DOWN_135M, Q_135M, KV_135M)
