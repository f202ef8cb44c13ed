"""Settings of tasks that no cell could use are refused, with a message that says why."""

from __future__ import annotations

import pytest

from longspan.tasks.base import parse_task
from longspan.util.errors import SpecError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("copy:symbols=1", "from 2 to 26"),
        ("reverse:symbols=27", "from 2 to 26"),
        ("copy:copies=0", "from 1 to 16"),
        ("reverse:copies=2", "no setting 'copies'"),
        ("copy:score=words", "one of symbols, exact"),
        ("memorize:text=nowhere.txt", "neither a built-in text nor a file"),
        ("detect:score=words", "one of choice, generation"),
        ("reasoning:facts=3", "no setting 'facts'"),
        ("lookup:questions=0", "from 1 to 10,000"),
        ("lookup:width=0", "from 1 to 16"),
        ("lookup:symbols=1", "from 2 to"),
        ("lookup:symbols=1000", "from 2 to"),
        ("passkey:depths=10", "belong to protocol=pi"),
        ("passkey:protocol=pi,trials=3", "trials needs depths"),
        ("passkey:protocol=pi,depths=0", "at least 2"),
        ("passkey:protocol=pi,depths=1", "at least 2"),
        ("passkey:protocol=pi,depths=3,trials=0", "at least 1"),
        ("passkey:answer_tokens=0", "from 1 to 256"),
        ("passkey:template=raw", "one of none, chat"),
        ("ppl:window=2k", "leave out window="),
        ("ppl:stride=256", "no effect on protocol=window"),
        ("ppl:protocol=sliding", "ppl:protocol=sliding,window=2k"),
        ("ppl:protocol=rolling,window=2k,stride=256", "no effect on protocol=rolling"),
        ("ppl:protocol=sliding,window=128,stride=129", "from 1 to the window of 128"),
        ("ppl:protocol=yarn,window=8", "at least 64 tokens"),
        ("ppl:protocol=yarn,window=0", "at least 64 tokens"),
        ("ppl:text=nothing", "neither a built-in text nor a file"),
        ("stream-eval:every=0", "at least 1 line"),
        ("stream-eval:distance=-1", "0 lines or more"),
        ("stream-eval:digits=0", "from 1 to 18"),
        ("stream-qa:every=3", "no setting 'every'"),
    ],
)
def test_settings_out_of_range_are_refused(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_task(spec)
