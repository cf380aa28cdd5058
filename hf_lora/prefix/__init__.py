"""The frozen layers below the lowest adapted one: run once for each example, their output kept across epochs."""
