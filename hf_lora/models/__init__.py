"""A pretrained model with the right head: loaded, checked, and run fast."""
