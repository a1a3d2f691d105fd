"""The doors of other libraries: transformers' `generate`, models in memory, lm-eval."""
