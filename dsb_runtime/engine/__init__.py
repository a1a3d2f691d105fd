"""The engine: it runs one decoding step after another on the model's device."""
