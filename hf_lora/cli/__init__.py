"""The command `hf-lora`: parse, call, print. Nothing else imports it."""
