"""Adapters on the host: PEFT files to validated arrays, and their layout in pages.

Nothing here imports jax.
"""

from jchameleon.lora.adapter import HostAdapter, LoraPair
from jchameleon.lora.inspect import describe_adapter
from jchameleon.lora.layout import ChunkLayout, GroupLayout
from jchameleon.lora.peft import load_peft_adapter

__all__ = [
    "ChunkLayout",
    "GroupLayout",
    "HostAdapter",
    "LoraPair",
    "describe_adapter",
    "load_peft_adapter",
]
