"""Adapters: small trainable changes beside a layer's frozen weight."""
