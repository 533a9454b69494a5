"""PEFT's own tests, run stock and with every LoRA model patched; nothing of them is kept here."""
