"""A file of requests in, a file of rows out: offline batches.

`run_batch` runs one on an `LLM`; `open_batch` looks at a file before a model is loaded.
`docs/batch.md` describes the formats, how a run is resumed, and what bounds its memory.
Nothing here loads jax.

from jchameleon import LLM
from jchameleon.batch import run_batch

with LLM("smollm2-135m") as llm:
    summary = run_batch(llm, "requests.jsonl", "results.jsonl")
"""

from jchameleon.batch.job import Batch, open_batch, run_batch
from jchameleon.batch.progress import BatchSummary, Progress
from jchameleon.batch.settings import BatchConfig

__all__ = [
    "Batch",
    "BatchConfig",
    "BatchSummary",
    "Progress",
    "open_batch",
    "run_batch",
]
