"""What the LoRA tools do: LoRA as matrices (algebra), base models as files (base_model, rewrite), and one file for each tool."""
