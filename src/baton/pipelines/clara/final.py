"""What a folder of final weights says of itself: enough to load it and to answer with it."""

from __future__ import annotations

from typing import Any

from baton.pipelines.clara.config import Clara, StageName

ABOUT = "clara.json"


def about(config: Clara, stage: StageName, model: dict[str, str]) -> dict[str, Any]:
    """The contents of `clara.json`."""
    return {
        "schema": 1,
        "stage": stage,
        "base": model,
        "doc_max_length": config.memory.doc_max_length,
        "compress_rate": config.memory.compress_rate,
        "top_k": config.stage(stage).documents,
        "max_length": config.stage(stage).max_length,
        "max_new_tokens": config.eval.generate.max_new_tokens,
        "adapter": {
            "method": config.adapter.method,
            "r": config.adapter.r,
            "alpha": config.adapter.alpha,
            "dropout": config.adapter.dropout,
            "targets": config.adapter.targets,
        },
    }


def loading() -> str:
    """How to load it, for the model card; `{repository}` and `{folder}` are filled in."""
    return """\
```python
from baton.pipelines.clara.loader import load  # pip install baton-jobs

clara = load("{repository}", subfolder="{folder}")  # a folder, a zip file or a Hub repository
print(clara.answer("a question", ["a document", "another document"]))
```

The adapters (`encoder`, `decoder`, `query_reasoner`) are PEFT folders; `memory.safetensors` holds
the embeddings of the memory tokens; the base model is fetched under its own name and licence."""
