"""Many clients for some minutes, of whom some go away: `python tests/serve/soak.py MINUTES MODEL BACKEND`.

Starts `tinyllama serve`, has 32 clients ask it for texts, scores and taps, compares all that they get with
what the library gives, and prints JSON: what was answered, what was wrong, and the server's resident bytes,
file descriptors and threads when a tenth of the time was over, and at the end.
"""

import asyncio
import json
import random
import re
import subprocess
import sys
import time

import httpx
import psutil

import tinyllama

N_CLIENTS, N_TEXTS, GONE = 32, 40, 0.3  # the part of the clients that go away
PROMPTS = ("Once upon a time", "Tom", "The old king had three daughters, and", "A cat and a dog " * 20)


def wanted(llama, number: int) -> tuple[str, dict, list[str]]:
    """A request, and the texts that answer it."""
    rng = random.Random(number)
    prompt, n, choices = rng.choice(PROMPTS), rng.choice((1, 20, 60)), rng.choice((1, 1, 1, 3))
    body = {"prompt": prompt, "max_tokens": n, "seed": number, "temperature": rng.choice((0, 0.7, 1.3))}
    settings = {"n_predict": n, "temp": body["temperature"], "top_p": 1.0}
    texts = [llama.generate(prompt, seed=number + i, **settings) for i in range(choices)]
    return body | {"n": choices, "logprobs": rng.choice((None, 2))}, [str(text) for text in texts]


class Clients:
    """What they asked for and got."""

    def __init__(self, url: str, model: str, backend: str):
        self.url, llama = url, tinyllama.load(model, backend, 2)
        self.texts = [wanted(llama, number) for number in range(N_TEXTS)]
        self.score = [token.prob for token in llama.score(PROMPTS[2])[1:]]
        self.counts = dict.fromkeys(("whole", "stream", "gone", "score", "taps", "busy", "refused"), 0)
        self.wrong: list[str] = []

    async def run(self, until: float) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=300) as client:
            while time.monotonic() < until:
                what = random.choices((self.text, self.other, self.nonsense), (8, 1, 1))[0]
                try:
                    if random.random() < GONE:
                        await asyncio.wait_for(what(client), random.expovariate(2))
                    else:
                        await what(client)
                except TimeoutError:
                    self.counts["gone"] += 1
                except Exception as error:
                    self.wrong.append(f"{what.__name__}: {error!r:.300}")

    async def text(self, client: httpx.AsyncClient) -> None:
        body, texts = random.choice(self.texts)
        if random.random() < 0.5:
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 429:
                self.counts["busy"] += 1
                return await asyncio.sleep(1)
            found = [choice["text"] for choice in response.raise_for_status().json()["choices"]]
            self.counts["whole"] += 1
        else:
            found = [""] * len(texts)
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                if response.status_code == 429:
                    self.counts["busy"] += 1
                    return await asyncio.sleep(1)
                async for line in response.raise_for_status().aiter_lines():
                    if line.startswith("data: {"):
                        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                        found[choice["index"]] += choice["text"]
            self.counts["stream"] += 1
        if found != texts:
            self.wrong.append(f"{body}: {found} instead of {texts}"[:1000])

    async def other(self, client: httpx.AsyncClient) -> None:
        if random.random() < 0.5:
            body = (await client.post("/v1/score", json={"prompt": PROMPTS[2]})).raise_for_status().json()
            probs = [2.718281828459045 ** token["logprob"] for token in body["tokens"][1:]]
            if any(abs(one - other) > 1e-6 for one, other in zip(probs, self.score, strict=True)):
                self.wrong.append(f"score: {probs}")
            self.counts["score"] += 1
        else:
            asked = {
                "prompt": random.choice(PROMPTS),
                "taps": ["layers.*.residual", "layers.*.attention.weights"],
            }
            data = (await client.post("/v1/taps", json=asked)).raise_for_status().content
            if int.from_bytes(data[:8], "little") > len(data):
                self.wrong.append("taps: cut short")
            self.counts["taps"] += 1

    async def nonsense(self, client: httpx.AsyncClient) -> None:
        data = random.choice((b"{", b"{}", b'{"prompt": 3}', b'{"prompt": "' + b"a" * 100_000 + b'"}'))
        response = await client.post("/v1/completions", content=data)
        if response.status_code != 400:
            self.wrong.append(f"{data[:50]}: {response.status_code}")
        self.counts["refused"] += 1


async def soak(clients: Clients, process: psutil.Process, seconds: float) -> list[dict]:
    """The server's state when a tenth of the time is over, and at the end, when nobody asks any more."""

    def state() -> dict:
        figures = {"rss": process.memory_info().rss, "fds": process.num_fds()}
        return figures | {"threads": process.num_threads()}

    started = time.monotonic()
    running = [asyncio.create_task(clients.run(started + seconds)) for _ in range(N_CLIENTS)]
    await asyncio.sleep(seconds / 10)
    states = [state()]
    await asyncio.gather(*running)
    async with httpx.AsyncClient(base_url=clients.url) as client:
        for _ in range(100):
            page = (await client.get("/metrics")).text
            if "tinyllama_running 0.0" in page and "tinyllama_waiting 0.0" in page:
                break
            await asyncio.sleep(0.1)
        else:
            clients.wrong.append("something still runs")
    return [*states, state()]


def main(minutes: float, model: str, backend: str) -> None:
    command = [sys.executable, "-m", "tinyllama", "serve", "-m", model, "--backend", backend, "-t", "2"]
    server = subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stderr if "listens on" in line)
        reader = subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        clients = Clients(re.search(r"http\S+", line)[0], model, backend)
        states = asyncio.run(soak(clients, psutil.Process(server.pid), minutes * 60))
        server.terminate()
        found = {"counts": clients.counts, "wrong": clients.wrong[:20], "n_wrong": len(clients.wrong)}
        print(json.dumps(found | {"states": states, "status": server.wait()}))
        reader.wait()
    finally:
        server.kill()


if __name__ == "__main__":
    main(float(sys.argv[1]), *sys.argv[2:])
