"""What `hf-lora train` does, as Python: from data to a measured, saved classifier."""
