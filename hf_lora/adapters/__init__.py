"""The artifact: an adapter directory in PEFT's format with a sidecar and a card; on the Hub; as values."""
