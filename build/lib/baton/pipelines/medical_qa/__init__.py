"""LoRA and QLoRA over data scale on question answering: data, train, eval."""
