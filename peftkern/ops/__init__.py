"""The ops: one folder each, `reference.py` being the definition and the other files its backends."""

import torch

LIBRARY = torch.library.Library("peftkern", "DEF")
