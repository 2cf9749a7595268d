"""Wrong arguments: one message that says which ones are meant."""

import pytest
import tiny

from fixefficientnet.cli import suggestions

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--data", "x"], 'There is no command "train". Did you mean "reproduce" (FixRes; with --stage base'),
        (["finetune"], 'Did you mean "reproduce"'),
        (["eval", "lite0"], 'Did you mean "evaluate"'),
        (["reproduce", "lite0", "--lr", "1e-3"], "There is no option --lr. Did you mean --base-lr?"),
        (["reproduce", "lite0", "--img-size=96"], "Did you mean --test-size (base stage: --train-size)?"),
        (["reproduce", "lite0", "--model-ema"], "There is no option --model-ema. Did you mean --model-ema-decay?"),
        (["reproduce", "lite0", "--set", "lr=1"], "Each field of a recipe is an option itself"),
        (["reproduce", "lite0", "--resume"], "The command that began a run continues it."),
        (["reproduce", "lite0", "--val-split", "x"], "--data is missing."),
        (["evaluate", "lite0"], "--data is missing."),
        (["info", "b0", "b1"], 'What is "b1" for?'),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) else "",
)
def test_wrong_arguments_say_which_ones_are_meant(arguments: list[str], said: str):
    out, err = tiny.cli(*arguments, status=2)
    assert out == ""
    assert said in err
    assert err.startswith("Error: ") and err.endswith("\nTry --help.\n")


def test_what_is_suggested_is_there():
    commands, options = tiny.cli("--help")[0], tiny.cli("reproduce", "--help", columns=200)[0]
    assert all(f" {command} " in commands for command in suggestions._COMMANDS)
    assert all(option.partition(" ")[0] in options for option in suggestions._OPTIONS)
    others = [other for others in suggestions._OPTIONS.values() for other in others]
    assert not [other for other in others if f" {other} " in options]
