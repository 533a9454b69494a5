from .reference import dequantize_4bit  # noqa: F401
