"""vLLM on a CPU, in this process: 16 sequences at a time, finished ones make room for the next.

float32, compiled as vLLM does by itself; the prefix cache is emptied before each run, for new weights make it useless.
The log-prob of each token comes along, which RL needs.
"""

from __future__ import annotations

import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no second process: it would compete for the cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

from vllm import LLM, SamplingParams
from worker import Job, Work, serve


def rollout_job(kind: str):
    def make(work: Work) -> Job:
        requests, group = work.requests[kind], work.group
        engine = LLM(
            work.model, dtype="float32", skip_tokenizer_init=True, max_num_seqs=work.slots, seed=0,
            max_model_len=len(work.prompts[0]) + len(work.completions[0]),
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in requests.prompts for _ in range(group)]
        how = [
            SamplingParams(
                temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False, logprobs=0
            )
            for n in requests.lengths
        ]

        def run():
            engine.reset_prefix_cache()
            return engine.generate(prompts, how, use_tqdm=False)

        return Job(
            run, lambda found: {"new_tokens": [len(one.outputs[0].token_ids) for one in found]}
        )

    return make


if __name__ == "__main__":
    serve({kind: rollout_job(kind) for kind in ("rollout", "tail16", "tail64")})
