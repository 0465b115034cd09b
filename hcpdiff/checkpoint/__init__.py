"""Weight files: how they are written whole, what they hold, and what other programs call the same things."""
