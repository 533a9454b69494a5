"""The recipe: QLoRA fine-tuning of a language model over TRL's SFTTrainer, resumable, in one call or
command."""

from .config import FinetuneConfig
from .errors import InputError
from .recipe import FinetuneResult, finetune
from .signals import Interrupted

__all__ = ["FinetuneConfig", "FinetuneResult", "InputError", "Interrupted", "finetune"]
