"""Fine-tuning a chat model: the stages that the pipelines which do it have in common."""
