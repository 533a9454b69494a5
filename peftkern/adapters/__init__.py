"""Adapters beyond LoRA, and what is done with trained ones: merged, added, switched."""
