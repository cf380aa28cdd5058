"""The low-rank update of a weight: put into any `nn.Module` and taken out again. Knows nothing of text."""
