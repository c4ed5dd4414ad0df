"""vLLM on a CPU, in this process: 16 sequences at a time, finished ones make room for the next.

It computes in float32, compiled as vLLM does by itself. The prefix cache is emptied before each
run, because new weights make it useless. The log-prob of each token comes along, which RL needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process: it would compete for the cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

from vllm import LLM, RequestOutput, SamplingParams
from worker import Job, Work, serve


def rollout_job(kind: str) -> Callable[[Work], Job]:
    def make(work: Work) -> Job:
        requests = work.requests[kind]
        engine = LLM(
            work.model,
            dtype="float32",
            skip_tokenizer_init=True,
            max_num_seqs=work.slots,
            seed=0,
            max_model_len=len(work.prompts[0]) + len(work.completions[0]),
        )
        prompts = [{"prompt_token_ids": ids} for ids in requests.prompts for _ in range(work.group)]
        params = [
            SamplingParams(
                temperature=1.0, max_tokens=length, ignore_eos=True, detokenize=False, logprobs=0
            )
            for length in requests.lengths
        ]

        def run() -> list[RequestOutput]:
            engine.reset_prefix_cache()
            return engine.generate(prompts, params, use_tqdm=False)

        def evidence(outputs: list[RequestOutput]) -> dict:
            return {"new_tokens": [len(output.outputs[0].token_ids) for output in outputs]}

        return Job(run, evidence)

    return make


if __name__ == "__main__":
    serve({kind: rollout_job(kind) for kind in ("rollout", "tail16", "tail64")})
