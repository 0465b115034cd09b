"""What may be trained: each kind says what it touches, what it optimises, and what it exports."""
