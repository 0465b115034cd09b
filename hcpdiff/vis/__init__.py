"""Drawing pictures with a base model and LoRA: prompts, files, pipeline, saving."""
