"""One request to `/v1/completions` or `/v1/chat/completions`, from its body to its last byte."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedpeft.proxy.answers import Completion
from fedpeft.proxy.asking import Asked, Prompt, asked_of, fit, parse
from fedpeft.proxy.batch import New, Row, Ticket
from fedpeft.proxy.bodies import Answers, ChatAnswers, Given, Part, Token, Usage
from fedpeft.proxy.desk import Desk, View
from fedpeft.proxy.guard import Message, Receive, Send, answer, read_body, refuse
from fedpeft.proxy.refusal import FAILED, Refusal, refusal_of
from fedpeft.proxy.scoring import score
from fedpeft.proxy.settings import Settings
from fedpeft.proxy.streams import EventStream, Mailbox, batches, disconnected, event

DEFAULT_TOKENS = 16  # of /v1/completions, as in OpenAI's API; a chat's answer takes what there is room for
LAST_WORD_S = 1.0  # in which a client must take the event that ends its stream


@dataclass(frozen=True)
class Job:
    """A request in token ids."""

    asked: Asked
    view: View
    alpha: float | None
    prompts: Sequence[Sequence[int]]
    rows: Sequence[Row]  # prompts times n; none where nothing is to be said


class Reply:
    """Serves requests of one route; an ASGI application.

    Args:
        route: `completions` or `chat`.
    """

    def __init__(self, desk: Desk, route: str) -> None:
        self.desk, self.route = desk, route

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Read, decode, answer."""
        began, desk = time.monotonic(), self.desk
        try:
            body = await read_body(scope, receive, desk.options.max_body_bytes)
            job = await asyncio.to_thread(self.prepare, asked_of(parse(body), self.route, desk.limits))
        except ConnectionResetError:
            desk.ends.add(route=self.route, how="disconnected")
            return
        except Exception as error:
            desk.ends.add(route=self.route, how="refused")
            await refuse(send, refusal_of(error))
            return
        desk.tokens.add(sum(map(len, job.prompts)), kind="prompt")
        how = await _Turn(desk, self.route, job, send, began).run(receive)
        desk.ends.add(route=self.route, how=how)
        desk.whole.observe(time.monotonic() - began)

    def prepare(self, asked: Asked) -> Job:
        """Texts to token ids, and settings for each row. Raises Refusal."""
        desk = self.desk
        view = desk.view(asked.model)
        numbers = dict(asked.numbers)
        alpha = numbers.pop("alpha", view.alpha)
        if view.alpha is None and alpha is not None:
            raise Refusal(f"{view.name} has no alpha; leave it out, or ask {desk.main.name}", "alpha")
        seed = numbers.pop("seed", None)
        if seed is None:
            seed = secrets.randbits(63)
        prompts = [self._ids(prompt) for prompt in asked.prompts]
        rows: list[Row] = []
        for prompt in prompts:
            room = fit(len(prompt), asked.max_tokens, view.trio.room(prompt), self._default())
            settings = {"max_tokens": room, "stop": asked.stop, "logit_bias": asked.logit_bias, "alpha": alpha}
            settings |= {} if view.alpha is None else {"beta": desk.artefact.settings.get("beta", 0.0)}
            settings |= {"temperature": 1.0, "logprobs": asked.logprobs or 0, **numbers}
            if room:
                rows += [Row(prompt, Settings(seed=(seed + len(rows) + i) % 2**63, **settings)) for i in range(asked.n)]
        return Job(asked, view, alpha, prompts, rows)

    def _default(self) -> int:
        most = self.desk.options.max_tokens
        return most if self.route == "chat" else min(DEFAULT_TOKENS, most)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, str):
            ids: Sequence[int] = self.desk.words.encode(prompt)
        elif prompt and isinstance(prompt[0], dict):
            ids = self.desk.artefact.prompt(prompt)
        else:
            ids = prompt  # type: ignore[assignment]
        if not ids:
            raise Refusal("the prompt has no token; send at least one character", "prompt")
        return ids


class _Turn:
    """A request that is being answered."""

    def __init__(self, desk: Desk, route: str, job: Job, send: Send, began: float) -> None:
        self.desk, self.job, self.asked, self.send, self.began = desk, job, job.asked, send, began
        kind, prefix = (ChatAnswers, "chatcmpl") if route == "chat" else (Answers, "cmpl")
        self.answers = kind(
            f"{prefix}-{secrets.token_hex(12)}", int(time.time()), job.view.name, desk.words, self.asked.logprobs,
            self.asked.usage,
        )  # fmt: skip
        self.stream = EventStream(send)
        self.ticket: Ticket | None = None
        self.said = 0
        self._heard = False
        self.completions: list[Completion] = []

    async def run(self, receive: Receive) -> str:
        """Answer; how it ended. A client that leaves, or waits too long, frees its rows."""
        work = asyncio.ensure_future(self._stream() if self.asked.stream else self._whole())
        gone = asyncio.ensure_future(disconnected(receive))
        limit = self.desk.options.timeout_s
        try:
            await asyncio.wait({work, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return "finished"
            if gone.done():
                return "disconnected"
            error: BaseException = Refusal(
                f"the answer took longer than {limit:g} s; ask for fewer tokens", None, "timeout", 504, FAILED
            )
            how = "timeout"
        except Exception as raised:
            error, how = raised, "failed"
        finally:
            self._release()
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self.desk.tokens.add(self.said, kind="said")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end(refusal_of(error)), LAST_WORD_S)
        return how

    def _release(self) -> None:
        if self.ticket is not None:
            self.desk.engine.cancel(self.ticket)

    async def _end(self, refusal: Refusal) -> None:
        if self.stream.begun:
            await self.stream.end(refusal)
        else:
            await refuse(self.send, refusal)

    async def _parts(self) -> list[Part]:
        """The answers before their first token: empty, or with the prompt in front."""
        found, n = [], self.asked.n
        for i, prompt in enumerate(self.job.prompts):
            part = Part(0)
            if self.asked.echo:
                given = self.asked.prompts[i]
                part.text = given if isinstance(given, str) else self.desk.words.decode(prompt)
                if self.asked.logprobs is not None:
                    part.tokens = await self._scored(prompt)
            finish = None if self.job.rows else "length"
            found += [Part(i * n + j, part.text, list(part.tokens), finish) for j in range(n)]
        return found

    async def _scored(self, prompt: Sequence[int]) -> list[Token]:
        """The prompt's tokens as the model saw them; nothing stands before the first."""
        found: list[Token] = [Given(prompt[0], None)]
        if len(prompt) > 1:
            job, top = self.job, self.asked.logprobs or 0
            trio = job.view.trio
            work = partial(score, trio, [prompt], [1], job.alpha, top)
            (seen,) = await asyncio.wrap_future(self.desk.engine.call(work, trio.large))
            found += [Given(*each) for each in zip(prompt[1:], seen.logprobs, seen.top, strict=True)]
        return found

    def _submit(self) -> Mailbox:
        mailbox = Mailbox(len(self.job.rows), self.asked.stream)
        self.ticket = self.desk.engine.submit(self.job.view.trio, self.job.rows, mailbox.deliver)
        return mailbox

    def _take(self, part: Part, new: New) -> None:
        """Add a token to a part; the end token is counted neither as said nor shown."""
        each = new.emitted
        if self.asked.stream and not self._heard:
            self.desk.first.observe(time.monotonic() - self.began)
        self._heard = True
        part.text += each.text
        part.finish = each.finish
        if new.done is not None:
            self.completions.append(new.done)
        if each.token in self.job.view.trio.ends:
            return
        self.said += 1
        if self.asked.logprobs is not None:
            part.tokens.append(each)

    async def _whole(self) -> None:
        parts = await self._parts()
        if self.job.rows:
            async for news in batches(self._submit(), len(self.job.rows)):
                for new in news:
                    self._take(parts[new.row], new)
        await answer(self.send, self.answers.whole(parts, self._usage(), self._notes()))

    async def _stream(self) -> None:
        parts = await self._parts()
        mailbox = self._submit() if self.job.rows else None
        opening = b""
        for part in parts:
            first = self.answers.opening(part.index)
            opening += event(first) if first else b""
            opening += event(self.answers.chunk(part)) if part.text or part.tokens or part.finish else b""
        places = [sum(len(self.desk.words.text_of(each.token)) for each in part.tokens) for part in parts]
        if mailbox is not None:
            async for news in batches(mailbox, len(self.job.rows)):
                fresh: dict[int, Part] = {}
                for new in news:
                    self._take(fresh.setdefault(new.row, Part(new.row, offset=places[new.row])), new)
                content = b"".join(event(self.answers.chunk(part)) for part in fresh.values() if _worth(part))
                for row, part in fresh.items():
                    places[row] += sum(len(self.desk.words.text_of(each.token)) for each in part.tokens)
                if opening or content:
                    await self.stream.write(opening + content)
                    opening = b""
        closing = self.answers.closing(self._usage(), self._notes())
        if opening or closing:
            await self.stream.write(opening + (event(closing) if closing else b""))
        await self.stream.end()

    def _usage(self) -> Usage:
        return Usage(sum(map(len, self.job.prompts)), self.said)

    def _notes(self) -> dict[str, Any]:
        """What the answers were drawn from: alpha, and how much of the large model's probability was seen."""
        notes: dict[str, Any] = {} if self.job.alpha is None else {"alpha": self.job.alpha}
        if done := self.completions:
            notes |= {"exact": all(each.exact for each in done), "least_mass": min(each.least_mass for each in done)}
            notes |= {"mass": sum(each.mass for each in done) / len(done)}
        return notes


def _worth(part: Part) -> bool:
    """Whether a chunk says anything; one without is not sent."""
    return bool(part.text or part.tokens or part.finish)
