"""DeepSpeed engines as a function of a plan. The only package that imports deepspeed."""
