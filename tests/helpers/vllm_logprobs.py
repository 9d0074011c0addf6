"""Run by test_vllm.py with vLLM's own Python: FOLDER DTYPE TOKENS... -> JSON, for each token after the first the log probabilities
of the five likeliest and of itself."""

import json
import sys

from vllm import LLM, SamplingParams

folder, dtype, *tokens = sys.argv[1:]
llm = LLM(model=folder, skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_model_len=64, max_num_seqs=2)
asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5, detokenize=False, ignore_eos=True)
(answer,) = llm.generate([{"prompt_token_ids": [int(token) for token in tokens]}], asked)
found = [{token: value.logprob for token, value in of_one.items()} for of_one in answer.prompt_logprobs[1:]]
print(json.dumps(found), flush=True)
