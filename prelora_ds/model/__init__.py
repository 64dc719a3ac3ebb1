"""Building a model, finding its families, and attaching LoRA in peft's layout."""
