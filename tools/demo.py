"""Watch one base model answer through several LoRA adapters in one batch.

Every prompt goes through the base model and through each adapter that ships with the
package, all at once. On a terminal the replies grow side by side; elsewhere they are
printed piece by piece as they come. A table of the run ends it.
"""

import dataclasses
import shutil
import sys
import time
from typing import Any

from jchameleon import LLM, SamplingParams
from jchameleon.resources import demo_adapters

MODEL = "smollm2-135m"
BASE = "base"
PROMPTS = (
    "What is the capital of France?",
    "Name three colors of the rainbow.",
    "Why do people sleep at night?",
    "Give me a tip for learning to cook.",
)
MAX_TOKENS = 80
PIECE_CHARS = 48
REDRAW_EVERY_S = 0.1
SAMPLE_EVERY_S = 0.2


@dataclasses.dataclass(slots=True)
class Reply:
    """One reply as far as it has come."""

    prompt: str
    adapter: str
    text: str = ""
    num_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    shown_chars: int = 0


def main() -> None:
    adapters = demo_adapters()
    names = [BASE, *adapters]
    print(f"Loading {MODEL} and compiling its programs ...", flush=True)
    start_s = time.monotonic()
    with LLM(model=MODEL, adapters=adapters, dtype="float32") as llm:
        print(
            f"Ready after {time.monotonic() - start_s:.0f} s. {len(PROMPTS)} prompts "
            f"through {BASE} and {len(adapters)} adapters: "
            f"{len(PROMPTS) * len(names)} replies in one batch.\n",
            flush=True,
        )
        first, peak_pages = play(llm, names, shown=True)
        print("\nThe same batch again, adapters now in the cache ...", flush=True)
        again, _ = play(llm, names, shown=False)
        infos = {info.name: info for info in llm.list_adapters()}
        print_table(names, first, again, infos)
        total_pages = llm.stats().total_pages
        print(
            f"\npool: {peak_pages} of {total_pages} pages in use at the most "
            f"({peak_pages / total_pages:.0%}), KV cache and adapters together"
        )


def play(llm: LLM, names: list[str], *, shown: bool) -> tuple[list[Reply], int]:
    """Run every prompt through every adapter at once; show replies as they grow.

    Returns the replies, and the most pool pages in use.
    """
    replies = [Reply(prompt, name) for prompt in PROMPTS for name in names]
    live = sys.stdout.isatty() and shutil.get_terminal_size().lines > len(replies) + 6
    deltas = llm.stream(
        [llm.chat_prompt([{"role": "user", "content": r.prompt}]) for r in replies],
        adapters=[None if r.adapter == BASE else r.adapter for r in replies],
        sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
    )
    peak_pages = 0
    drawn_s = sampled_s = time.monotonic()
    if shown and live:
        draw(replies, again=False)
    for delta in deltas:
        reply = replies[delta.index]
        reply.num_tokens += len(delta.token_ids)
        reply.text += delta.text
        if delta.timing is not None:
            if delta.error:
                sys.exit(f"demo: {reply.adapter}: {delta.error}")
            reply.ttft_s = delta.timing.ttft_s or 0.0
            reply.total_s = delta.timing.total_s
        if time.monotonic() - sampled_s > SAMPLE_EVERY_S:
            stats = llm.stats()  # answered between two iterations: not for every token
            peak_pages = max(peak_pages, stats.kv_pages + stats.adapter_pages)
            sampled_s = time.monotonic()
        if not shown:
            continue
        if not live:
            print_pieces(reply, ended=delta.finish_reason is not None)
        elif time.monotonic() - drawn_s > REDRAW_EVERY_S:
            draw(replies, again=True)
            drawn_s = time.monotonic()
    if shown and not live:
        print("\nThe replies, whole:")
    if shown:
        draw(replies, again=live)
    return replies, peak_pages


def draw(replies: list[Reply], *, again: bool) -> None:
    """Print every reply on a line below its prompt; `again` goes over the old lines."""
    width = shutil.get_terminal_size((100, 24)).columns
    lines = []
    for reply in replies:
        if reply.adapter == BASE:
            lines += ["", reply.prompt]
        text = " ".join(reply.text.split())
        room = width - 14 if sys.stdout.isatty() else len(text)
        lines.append(f"  {reply.adapter:<9} {shortened(text, room)}")
    up = f"\x1b[{len(lines)}A" if again else ""
    clear = "\x1b[K" if again else ""
    print(up + "".join(f"{line}{clear}\n" for line in lines), end="", flush=True)


def shortened(text: str, room: int) -> str:
    """Cut out the middle of what does not fit: beginning and end show an adapter."""
    if len(text) <= room:
        return text
    head = room * 2 // 3
    return text[:head] + " ... " + text[len(text) - (room - head - 5) :]


def print_pieces(reply: Reply, *, ended: bool) -> None:
    """Print what a reply has gained, once it is worth a line."""
    fresh = " ".join(reply.text[reply.shown_chars :].split())
    if fresh and (ended or len(fresh) >= PIECE_CHARS):
        prompt = PROMPTS.index(reply.prompt) + 1
        print(f"[{prompt} {reply.adapter:<9}] {fresh}", flush=True)
        reply.shown_chars = len(reply.text)


def print_table(
    names: list[str], first: list[Reply], again: list[Reply], infos: dict[str, Any]
) -> None:
    """Print one row per adapter and one for all together.

    Tokens/s are those of the second run: a group's tokens over the time until its last
    reply ended, while all the others ran too.
    """
    row = "{:<9} {:>5} {:>8} {:>11} {:>11} {:>9} {:>11} {:>13} {:>9}"
    print()
    print(
        row.format(
            *("adapter", "rank", "replies", "TTFT first", "TTFT again", "tokens/s"),
            *("cache hits", "cache misses", "pool"),
        )
    )
    for name in [*names, "all"]:
        groups = [
            [r for r in run if name in (r.adapter, "all")] for run in (first, again)
        ]
        ttfts = [f"{sum(r.ttft_s for r in g) / len(g):.2f} s" for g in groups]
        tokens = sum(reply.num_tokens for reply in groups[1])
        rate = tokens / max(reply.total_s for reply in groups[1])
        facts = ["-"] * 4
        if info := infos.get(name):
            pool = f"{info.size_bytes / 2**20:.1f} MiB"
            facts = [str(info.rank), str(info.hits), str(info.misses), pool]
        replies = sum(map(len, groups))
        print(row.format(name, facts[0], replies, *ttfts, f"{rate:.1f}", *facts[1:]))


if __name__ == "__main__":
    main()
