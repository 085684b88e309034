"""Default objectives by model and priority."""

from __future__ import annotations

import pytest

from baton.errors import ConfigError
from baton.objectives import Defaults
from baton.spec import Objectives


def test_the_rule_that_names_most_wins_and_the_request_has_the_last_word() -> None:
    defaults = Defaults("*:ttft=1000,tpot=50; 10:ttft=200; big@*:tpot=80; big@10:ttft=300,tpot=90;")
    assert defaults.fill(Objectives(), "small", 0) == Objectives(1000, 50)
    assert defaults.fill(Objectives(), "small", 10) == Objectives(200, None)
    assert defaults.fill(Objectives(), "big", 3) == Objectives(None, 80)
    assert defaults.fill(Objectives(), "big", 10) == Objectives(300, 90)
    assert defaults.fill(Objectives(ttft_ms=5), "big", 10) == Objectives(5, 90)


def test_no_rules_add_nothing() -> None:
    assert Defaults("").fill(Objectives(tpot_ms=3), "any", 0) == Objectives(tpot_ms=3)


@pytest.mark.parametrize(
    "text", ["ttft=5", "*:", "x:ttft=5", "*:ttft", "*:ttft=a", "*:ttft=0", "*:ttft=nan", "*:itl=5", "@1:ttft=5"]
)
def test_what_is_wrong_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^slo: .*; expected \[MODEL@\]PRIORITY:ttft=MS,tpot=MS$"):
        Defaults(text)
