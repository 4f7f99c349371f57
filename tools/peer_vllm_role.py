"""vLLM in a process of its own; `peer_vllm.py` starts it with vLLM's own Python.

Reads one JSON object a line and answers with one. The first says what to start:
{"model": a Hugging Face directory, "adapters": name -> [PEFT directory, rank], ...};
each other one is a run of requests. It ends when its input does.
"""

import json
import os
import sys
import time


def start(order):
    """Return vLLM's engine and its LoRA requests by adapter name."""
    from vllm import LLM

    options = {
        "model": order["model"],
        "dtype": order["dtype"],
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "max_model_len": order["max_model_len"],
        "max_num_seqs": order["num_requests"],
        "seed": 0,
    }
    adapters = {}
    if order["adapters"]:
        from vllm.lora.request import LoRARequest

        options["enable_lora"] = True
        options["max_loras"] = len(order["adapters"])
        options["max_lora_rank"] = max(rank for _, rank in order["adapters"].values())
        for number, (name, (path, _)) in enumerate(order["adapters"].items(), 1):
            adapters[name] = LoRARequest(name, number, path)
    return LLM(**options), adapters


def run(llm, adapters, order):
    """Return what one batch of greedy requests took, and its tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=order["output_tokens"],
        ignore_eos=True,
        detokenize=False,
    )
    options = {}
    if any(order["adapters"]):
        options["lora_request"] = [adapters[name] for name in order["adapters"]]
    start_s = time.monotonic()
    outs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in order["prompts"]],
        sampling,
        use_tqdm=False,
        **options,
    )
    wall_s = time.monotonic() - start_s
    return {"wall_s": wall_s, "tokens": [list(o.outputs[0].token_ids) for o in outs]}


def main():
    # vLLM writes to standard output; answers go where only this file does.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(facts):
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    start_s = time.monotonic()
    llm, adapters = start(json.loads(sys.stdin.readline()))
    import vllm

    tell({"version": vllm.__version__, "start_s": time.monotonic() - start_s})
    for line in sys.stdin:
        tell(run(llm, adapters, json.loads(line)))


if __name__ == "__main__":
    main()
