"""`fedpeft serve --logits`: wrong requests. That it serves is tested in `tests/proxy/test_backends.py`."""

from __future__ import annotations

import pytest

from command_line import call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "fedpeft serve --logits MODEL"),
        (("--logits", "demo-small", "--host", "0.0.0.0"), "there is no key"),
        (("--logits", "demo-small", "--api-key-env", "NOT_SET_AT_ALL"), "NOT_SET_AT_ALL"),
        (("--logits", "demo-small", "--wire", "int8"), "--wire is 'int8'"),
        (("--logits", "demo-small", "--idle", "0"), "idle_s is 0"),
        (("--logits", "demo-small", "--max-batch", "0"), "--max-batch is 0"),
        (("--logits", "demo", "--port", "0"), "family bert"),
    ],
)
def test_wrong_requests_of_the_command_end_with_code_2(arguments, words):
    done = call("serve", *arguments)
    assert done.exit_code == 2 and words in done.output, done.output
