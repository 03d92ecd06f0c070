"""News of a request on their way to its reader."""

from __future__ import annotations

import asyncio
import threading

import pytest

from fedpeft.proxy import streams
from fedpeft.proxy.answers import Completion, Emitted
from fedpeft.proxy.engine import New

DONE = Completion((1,), "a", "stop", (0.0,), ((),), None, 1.0, 1.0, True)


def new(done: Completion | None = None) -> list[New]:
    return [New(0, Emitted(0, 1, "a", 0.0, (), None if done is None else "stop"), done)]


@pytest.mark.parametrize("error", [None, ValueError("it died")])
def test_the_end_does_not_wait_for_the_pace(monkeypatch: pytest.MonkeyPatch, error: ValueError | None) -> None:
    """Tokens wait until a minute is over; the last one, or an error, does not."""
    monkeypatch.setattr(streams, "EVERY_S", 60.0)

    async def read() -> None:
        mailbox = streams.Mailbox(1, True)
        mailbox.deliver(new())
        assert len(await mailbox.read()) == 1
        later = asyncio.create_task(mailbox.read())
        await asyncio.sleep(0.05)
        mailbox.deliver(new())
        await asyncio.sleep(0.05)
        assert not later.done()
        threading.Thread(target=mailbox.deliver, args=(error or new(DONE),)).start()
        assert len(await asyncio.wait_for(later, 20)) == (1 if error else 2)
        if error:
            with pytest.raises(ValueError, match="it died"):
                await asyncio.wait_for(mailbox.read(), 20)

    asyncio.run(read())
