"""Frozen weights in 8 or 4 bits, made dense for as long as one product needs them."""

from .layers import Plan, stored_bytes
from .tensor import Quantized

__all__ = ["Plan", "Quantized", "stored_bytes"]
