"""The decode loop: what runs one step after another on the model's device."""
