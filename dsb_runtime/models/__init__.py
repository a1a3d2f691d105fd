"""Checkpoints: how they are loaded, registered with transformers and converted."""
