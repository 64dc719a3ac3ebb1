"""Build a model, find its families of linears, and attach LoRA in peft's layout."""
