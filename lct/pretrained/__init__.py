"""Models that others trained: diffusers' files in and out, VAEs and text encoders, attention for its pipelines."""
