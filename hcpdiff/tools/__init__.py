"""Command lines over the packages above."""
