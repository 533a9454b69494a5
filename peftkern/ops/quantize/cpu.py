from .reference import quantize_4bit, quantize_absmax  # noqa: F401
