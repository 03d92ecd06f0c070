"""A process that runs the command line over a model that says one text slowly; arguments are those of fedpeft.

python serving_process.py TEXT PAUSE_S GRACE_S serve RUN_DIR --port 0
"""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def main(text: str, pause_s: str, grace_s: str, *arguments: str) -> None:
    """Run the command with an artefact that needs no run."""
    from fedpeft.app import serving
    from fedpeft.cli import main as command_line
    from fedpeft.proxy.blackbox import Scores
    from proxy import parrot

    class Slow(parrot.Said):
        def scores(self, new: Sequence[Sequence[int]]) -> Scores:
            time.sleep(float(pause_s))
            return super().scores(new)

    def open_artefact(folder: Path, large: str | None, **told: object):
        artefact = parrot.speaking(text)
        artefact.trio.large.session = Slow
        return artefact

    sys.modules["fedpeft.app.proxying"] = types.SimpleNamespace(open_artefact=open_artefact)
    serving.GRACE_S = float(grace_s)
    command_line(arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
