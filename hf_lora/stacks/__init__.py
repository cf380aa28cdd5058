"""Many adapters in one model: the updates of each weight stacked, and every sequence of a batch with its own."""
