"""Many clients at a server that speaks OpenAI's interface: what is lost or mixed up, throughput, first and each token.

python benchmarks/serve_load.py http://127.0.0.1:8000 MODEL --clients 50 --requests 200 --tokens 24

Works against any such server, so that two can be compared on one machine. Prompts differ in their length and their seed; each
is sent twice, and greedy answers to the same prompt must be the same whoever else asks at the time.
"""

import argparse
import asyncio
import json
import random
import sys
import time

import httpx

WORDS = "the king and queen of all that land went out to see a ship upon the river while it was still dark".split()


async def one(client: httpx.AsyncClient, model: str, prompt: str, tokens: int, chat: bool) -> tuple[str, list[float]]:
    """The text of one streamed answer, and when each piece came, in seconds after the request."""
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    began, text, times = time.perf_counter(), "", []
    path = "/v1/chat/completions" if chat else "/v1/completions"
    async with client.stream("POST", path, json=body) as stream:
        stream.raise_for_status()
        async for line in stream.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                piece = (choice.get("delta") or {}).get("content") if chat else choice["text"]
                if piece:
                    text += piece
                    times.append(time.perf_counter() - began)
    return text, times


async def load(args: argparse.Namespace) -> dict[str, float]:
    rng = random.Random(0)
    lengths = [max(1, args.words // part) for part in (30, 9, 3, 1)]
    prompts = [" ".join(rng.choices(WORDS, k=rng.choice(lengths))) for _ in range(-(-args.requests // 2))] * 2
    rng.shuffle(prompts)
    most = {prompt: rng.randrange(args.tokens // 2, args.tokens + 1) for prompt in sorted(set(prompts))}
    gate, answers, firsts, whole, lost = asyncio.Semaphore(args.clients), {}, [], [], 0
    mixed_up = 0
    async with httpx.AsyncClient(base_url=args.url, timeout=args.timeout, limits=httpx.Limits()) as client:
        await one(client, args.model, prompts[0], 4, args.chat)  # so that nothing is compiled while the clock runs
        began = time.perf_counter()

        async def ask(prompt: str) -> None:
            nonlocal lost, mixed_up
            async with gate:
                try:
                    text, times = await one(client, args.model, prompt, most[prompt], args.chat)
                except httpx.HTTPError as e:
                    print(f"{type(e).__name__}: {e}", file=sys.stderr)
                    lost += 1
                    return
            mixed_up += answers.setdefault(prompt, text) != text
            if times:
                firsts.append(times[0])
                whole.append((times[-1] - times[0]) / max(1, most[prompt] - 1))

        await asyncio.gather(*map(ask, prompts))
        seconds = time.perf_counter() - began

    def at(values: list[float], share: float) -> float:
        return sorted(values)[min(len(values) - 1, int(share * len(values)))]

    total = sum(most[prompt] for prompt in prompts)
    return {
        "requests": len(prompts),
        "lost": lost,
        "mixed_up": mixed_up,
        "seconds": round(seconds, 1),
        "tokens_per_second_at_most": round(total / seconds, 1),
        "first_token_p50": round(at(firsts, 0.5), 3),
        "first_token_p99": round(at(firsts, 0.99), 3),
        "per_token_p50": round(at(whole, 0.5), 4),
        "per_token_p99": round(at(whole, 0.99), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument(
        "--tokens", type=int, default=24, help="most tokens of an answer; each wants half of it to all of it"
    )
    parser.add_argument(
        "--words", type=int, default=90, help="of the longest prompts; others have a 3rd, 9th and 30th of it"
    )
    parser.add_argument("--chat", action="store_true", help="by /v1/chat/completions")
    parser.add_argument("--timeout", type=float, default=600)
    print(json.dumps(asyncio.run(load(parser.parse_args()))))


if __name__ == "__main__":
    main()
