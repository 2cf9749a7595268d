"""What is said of wrong arguments: names that other tools have for a command or an option lead to ours."""

from cyclopts import CycloptsError, MissingArgumentError, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

_COMMANDS = {
    "reproduce": ("train", "fit", "finetune", "fine-tune", "fine_tune", "tune"),
    "evaluate": ("eval", "validate", "val", "test", "benchmark"),
    "predict": ("classify", "infer", "inference"),
    "publish": ("upload", "push"),
    "list": ("ls", "models"),
}
_HINTS = {"reproduce": " (FixRes; with --stage base it trains a network for your own classes first)"}
_OPTIONS = {
    "--base-lr": ("--lr", "--learning-rate", "--lr-base"),
    "--batch-size": ("--bs", "--train-batch-size"),
    "--test-size (base stage: --train-size)": ("--img-size", "--image-size", "--imgsz", "--size", "--resolution"),
    "--weight-decay": ("--wd",),
    "--label-smoothing": ("--smoothing",),
    "--mixed-precision": ("--amp", "--precision", "--fp16", "--bf16"),
    "--checkpoint": ("--weights", "--initial-checkpoint", "--pretrained-path"),
    "--backbone": ("--model", "--arch"),
    "--data": ("--data-dir", "--data-path", "--dataset"),
    "--tune": ("--freeze",),
    "--model-ema-decay": ("--model-ema", "--ema", "--ema-decay", "--model-ema-warmup"),
    "--patience": ("--early-stopping", "--early-stopping-patience"),
    "--warmup-epochs": ("--warmup", "--warmup-steps", "--warmup-ratio"),
}
"""Options of `reproduce`, and what timm's and other training scripts call them."""


_ELSE = {
    "--set": "Each field of a recipe is an option itself, such as --base-lr 1e-3.",
    "--resume": "The command that began a run continues it.",
}
"""Options of other tools that have no counterpart, and what there is instead."""


def explain(error: CycloptsError) -> str:
    """The message for arguments that could not be read."""
    match error:
        case UnknownCommandError(unused_tokens=[word, *_]):
            for command, others in _COMMANDS.items():
                if word.lower() in others:
                    return f'There is no command "{word}". Did you mean "{command}"{_HINTS.get(command, "")}?'
        case UnknownOptionError(command_chain=("reproduce",)):
            return _of_option(str(error.token.keyword or error.token.value).partition("=")[0]) or str(error)
        case UnusedCliTokensError(unused_tokens=[word, *_]):
            return f'What is "{word}" for? The command takes no such argument.'
        case MissingArgumentError() if error.argument is not None and not error.keyword:
            return f"{error.argument.name} is missing."
    return str(error)


def _of_option(option: str) -> str | None:
    if option in _ELSE:
        return f"There is no option {option}. {_ELSE[option]}"
    for ours, others in _OPTIONS.items():
        if option in others:
            return f"There is no option {option}. Did you mean {ours}?"
    return None
