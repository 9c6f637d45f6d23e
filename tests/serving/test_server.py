"""`kvfold serve` under many clients, on the real model: `make test-vllm`."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm
REQUESTS, CLIENTS, LONGEST = 500, 16, 24


@pytest.fixture(scope="module")
def server(codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """Port and process of a server that keeps prefixes too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "kvfold", "serve", "smollm2", "--codec", str(codec)]
    command += ["--prefixes", str(folder / "prefixes"), "--prefix-gib", "0.05"]
    command += ["--", "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "1024", "--enforce-eager"]
    command += ["--served-model-name", "m", "--max-num-seqs", str(CLIENTS)]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            deadline = time.monotonic() + 300
            while not healthy(port):
                assert running.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(1)
            yield port, running.pid
        finally:
            running.terminate()
            running.wait(60)


def healthy(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False


def ask(port: int, ids: list[int], tokens: int, give_up: bool = False) -> list[int] | None:
    """The tokens said; None if the client hangs up after the first."""
    body = {"model": "m", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": give_up}
    body |= {"return_token_ids": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if give_up:
            assert response.readline()
            return None
        told = json.loads(response.read())
        assert response.status == 200, told
        return told["choices"][0]["token_ids"]
    finally:
        connection.close()


def memory(pid: int) -> int:
    """Bytes of a process and those it started, as far as they are its own."""
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and pid in ancestors(int(folder.name)):
            try:
                lines = (folder / "smaps_rollup").read_text().splitlines()
            except OSError:
                continue
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty:", "Private_Clean:")))
    return total


def ancestors(pid: int) -> list[int]:
    found = [pid]
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.append(pid)
    return found


def test_500_requests_of_16_clients(server: tuple[int, int], prompts: list[list[int]]) -> None:
    """Mixed lengths, one in eight hung up on: every other one is answered, with what its own prompt says and no other's (about
    half of them to the last token: who shares a batch decides how sums are rounded), and memory is no larger at the end than
    after the first hundred."""
    port, pid = server
    chosen = [ids + prompts[i + 25][: 8 * i] for i, ids in enumerate(prompts[:25])]  # 25 prompts of 8 to 296 tokens
    alone = [ask(port, ids, LONGEST) for ids in chosen]
    turns = random.Random(0)
    plan = [(turns.randrange(25), turns.randint(4, LONGEST), turns.random() < 1 / 8) for _ in range(REQUESTS)]
    left, answers, sizes, lock = list(enumerate(plan)), dict[int, Any](), list[int](), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                if not left:
                    return
                number, (which, tokens, give_up) = left.pop(0)
            try:
                answers[number] = ask(port, chosen[which], tokens, give_up)
            except Exception as error:
                answers[number] = error
            if number % 100 == 99:
                sizes.append(memory(pid))

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    assert sorted(answers) == list(range(REQUESTS))  # none lost
    answered = same = 0
    for number, (which, tokens, give_up) in enumerate(plan):
        said = answers[number]
        if give_up:
            assert said is None
            continue
        assert isinstance(said, list), said
        assert len(said) == tokens
        agreeing = [sum(a == b for a, b in zip(said, other or [], strict=False)) for other in alone]
        assert agreeing[which] == max(agreeing), (number, agreeing)  # none mixed up
        answered += 1
        same += said == (alone[which] or [])[:tokens]
    assert same > 0.4 * answered
    assert healthy(port)
    assert sizes[-1] <= 1.05 * sizes[0], sizes
