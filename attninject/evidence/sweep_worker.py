"""A worker of the local engine: `python -m attninject.evidence.sweep_worker`, a line of JSON in for each run.

In: {"settings": …, "threads": …}. Out, on what was standard output: {"said": line}, and at the end of the run
{"done": true} or {"failed": text}. Whatever libraries print goes to standard error, which the engine keeps in a file.
"""

from __future__ import annotations

import json
import os
import sys
from typing import IO, Any

from attninject import plugins
from attninject.errors import AttnInjectError

from .sweep_runs import carry_on


def main() -> None:
    """Runs until there are no more lines."""
    plugins.load_inherited()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            _answer(answers, _carried_on(answers, json.loads(line)))


def _carried_on(answers: IO[str], asked: dict[str, Any]) -> dict[str, Any]:
    try:
        carry_on(asked["settings"], asked["threads"], lambda text: _answer(answers, {"said": text}))
    except (AttnInjectError, OSError, RuntimeError) as error:
        return {"failed": " ".join(str(error).split()) or type(error).__name__}
    return {"done": True}


def _answer(answers: IO[str], said: dict[str, Any]) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
