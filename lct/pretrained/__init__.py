"""Models that others trained: diffusers' files in and out, VAEs and text encoders, LoRA, attention for pipelines."""
