"""The long-context MMDiT (`mmdit`), its configurations (`config`), KV cache (`cache`), text encoder and flow."""
