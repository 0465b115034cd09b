"""hcpdiff: train LoRA on Stable Diffusion from one YAML file, draw with it, convert it."""

__version__ = "0.1.0"
