"""Answers: a classifier of texts from an adapter, and its exports."""
