"""Peak memory of a process that holds one engine.

    python tools/peers_memory.py CONFIG

is a process of its own that bench_peers.py starts: CONFIG is a JSON object, the answer
on standard output another.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jchameleon import LLM, SamplingParams
from jchameleon.models.loader import LoadedModel
from jchameleon.models.params import tensor_views


def peak_resident_bytes() -> int | None:
    """Return the most that this process ever had in memory; None where unknown.

    Not what `getrusage` says: that starts with the size of the parent.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10  # in KiB
    return None


def measure_memory(config: Mapping[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    """Run a batch in a process of its own and return what it took.

    Args:
      config: "model", "adapters" (name -> directory), "engine" (fields of
        `EngineConfig`), "num_requests", "prompt_tokens", "output_tokens".
      loaded: the same model, whose weights count.
    """
    command = [sys.executable, str(Path(__file__)), json.dumps(config)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    weights = tensor_views(loaded.config, loaded.params).values()
    found["weight_bytes"] = sum(view.nbytes for view in weights)
    least = found["weight_bytes"] + found["pool_bytes"]
    found["ratio"] = found["peak_bytes"] and found["peak_bytes"] / least
    return found


def main() -> None:
    config = json.loads(sys.argv[1])
    names = [*config["adapters"]]
    with LLM(config["model"], adapters=config["adapters"], **config["engine"]) as llm:
        shape = (config["num_requests"], config["prompt_tokens"])
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, llm.model_config.vocab_size, shape).tolist()
        sampling = SamplingParams(
            max_tokens=config["output_tokens"], temperature=0.0, ignore_eos=True
        )
        adapters = [names[i % len(names)] for i in range(len(prompts))]
        outs = llm.generate(prompts, adapters=adapters, sampling=sampling)
        assert all(len(out.token_ids) == config["output_tokens"] for out in outs)
        facts = {"pool_bytes": llm.facts().pool_bytes}
    print(json.dumps({"peak_bytes": peak_resident_bytes(), **facts}))


if __name__ == "__main__":
    main()
