"""The other side of `vllm.py`: `python vllm_process.py job.json`, in whichever Python has vLLM.

It imports nothing of baton. Each answer is a line of JSON on its output; what vLLM says goes to
the error output.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer every request of the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        return  # whoever asked went before this process was tied to it: nobody would read an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # One process: whoever ends this one ends all of vLLM.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM

    memory = {} if job["memory"] is None else {"gpu_memory_utilization": job["memory"]}
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],  # its own choice would be 16 bits for float32 weights
        max_model_len=job["most_tokens"],
        generation_config="vllm",
        disable_log_stats=True,
        **memory,
    )
    for number, request in enumerate(job["requests"]):
        llm.llm_engine.add_request(
            str(number), {"prompt_token_ids": request["prompt"]}, _decoding(job, request["seed"])
        )
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                tokens = list(output.outputs[0].token_ids)
                answer = {"number": int(output.request_id), "tokens": tokens}
                print(json.dumps(answer), file=answers, flush=True)


def _decoding(job: dict[str, Any], seed: int) -> Any:
    from vllm import SamplingParams

    drawn = job["sampling"]
    how = (
        {"temperature": 0.0}
        if drawn is None
        else {
            "temperature": drawn["temperature"],
            "top_p": drawn["top_p"],
            "top_k": drawn["top_k"],
            "repetition_penalty": drawn["repetition_penalty"],
            "seed": seed,
        }
    )
    return SamplingParams(
        max_tokens=job["max_new_tokens"],
        stop_token_ids=job["ends"],
        ignore_eos=True,  # what ends an answer is in `ends`
        detokenize=False,
        **how,
    )


if __name__ == "__main__":
    main()
