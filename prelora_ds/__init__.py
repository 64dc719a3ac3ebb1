"""Pre-training of Vision Transformers that switches from all parameters to LoRA when training has settled."""

__version__ = "0.1.0"
