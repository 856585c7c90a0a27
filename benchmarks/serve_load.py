"""Many clients at a server that speaks OpenAI's interface: what is lost or mixed up, throughput, first and each token.

python benchmarks/serve_load.py http://127.0.0.1:8000 MODEL --clients 50 --requests 200 --tokens 24
python benchmarks/serve_load.py http://127.0.0.1:8000 MODEL --clients 50 --requests 1000 --embed

Works against any such server, so that two can be compared on one machine. There are `--distinct` prompts, which differ in their
length, and each is sent about equally often. Before the load, one client asks for each of them alone; under load, a greedy answer
that is not the one it got alone is counted as mixed up. Vectors of the same text may differ by rounding, since texts of one batch
share its length. `per_token` are all gaps between two pieces of a stream.
"""

import argparse
import asyncio
import itertools
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


async def embedded(client: httpx.AsyncClient, model: str, text: str) -> tuple[list[float], float]:
    """The vector of one text, and the seconds that it took."""
    began = time.perf_counter()
    answer = await client.post("/v1/embeddings", json={"model": model, "input": text})
    answer.raise_for_status()
    return answer.json()["data"][0]["embedding"], time.perf_counter() - began


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    """The 50th and the 99th, in seconds."""
    ranked = sorted(values)
    return {
        f"{name}_p{share}": round(ranked[min(len(ranked) - 1, share * len(ranked) // 100)], 4)
        for share in (50, 99)
        if ranked
    }


async def load(args: argparse.Namespace) -> dict[str, float]:
    rng = random.Random(0)
    lengths = [max(1, args.words // part) for part in (30, 9, 3, 1)]
    made = dict.fromkeys(" ".join(rng.choices(WORDS, k=rng.choice(lengths))) for _ in range(args.distinct))
    prompts = list(itertools.islice(itertools.cycle(made), args.requests))
    rng.shuffle(prompts)
    most = {prompt: rng.randrange(args.tokens // 2, args.tokens + 1) for prompt in sorted(made)}
    gate, answers, firsts, gaps, whole = asyncio.Semaphore(args.clients), {}, [], [], []
    lost = mixed_up = pieces = 0
    async with httpx.AsyncClient(base_url=args.url, timeout=args.timeout, limits=httpx.Limits()) as client:
        # So that little is compiled while the clock runs.
        await (
            embedded(client, args.model, prompts[0]) if args.embed else one(client, args.model, prompts[0], 4, args.chat)
        )
        if args.alone:
            began = time.perf_counter()
            for prompt in made:
                answers[prompt], _ = (
                    await embedded(client, args.model, prompt)
                    if args.embed
                    else await one(client, args.model, prompt, most[prompt], args.chat)
                )
            alone = {"alone": len(made), "alone_seconds": round(time.perf_counter() - began, 1)}
        else:
            alone = {}
        began = time.perf_counter()

        async def ask(prompt: str) -> None:
            nonlocal lost, mixed_up, pieces
            async with gate:
                try:
                    if args.embed:
                        found, seconds = await embedded(client, args.model, prompt)
                        times = []
                    else:
                        found, times = await one(client, args.model, prompt, most[prompt], args.chat)
                        seconds = times[-1] if times else 0.0
                except httpx.HTTPError as e:
                    print(f"{type(e).__name__}: {e}", file=sys.stderr)
                    lost += 1
                    return
            before = answers.setdefault(prompt, found)
            mixed_up += (
                max(abs(a - b) for a, b in zip(before, found, strict=True)) > 1e-3 if args.embed else before != found
            )
            whole.append(seconds)
            pieces += len(times)
            firsts.extend(times[:1])
            gaps.extend(b - a for a, b in itertools.pairwise(times))

        await asyncio.gather(*map(ask, prompts))
        seconds = time.perf_counter() - began
    figures = alone | {"requests": len(prompts), "lost": lost, "mixed_up": mixed_up, "seconds": round(seconds, 1)}
    figures["requests_per_second"] = round((len(prompts) - lost) / seconds, 2)
    if not args.embed:
        figures["tokens_per_second_at_most"] = round(sum(most[prompt] for prompt in prompts) / seconds, 1)
        figures |= {"pieces": pieces} | percentiles("first_token", firsts) | percentiles("per_token", gaps)
    return figures | percentiles("request", whole)


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
    parser.add_argument("--distinct", type=int, default=100, help="prompts")
    parser.add_argument(
        "--no-alone",
        dest="alone",
        action="store_false",
        help="ask for nothing alone first: the first answer to a prompt is then the one that the others are held against",
    )
    parser.add_argument("--chat", action="store_true", help="by /v1/chat/completions")
    parser.add_argument("--embed", action="store_true", help="by /v1/embeddings: --words alone counts")
    parser.add_argument("--timeout", type=float, default=600)
    print(json.dumps(asyncio.run(load(parser.parse_args()))))


if __name__ == "__main__":
    main()
