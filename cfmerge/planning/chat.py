"""The chat template of the output: the base's, that of most models, ChatML, or one that the recipe writes out.

A model has it in `chat_template.jinja`, which wins, or in `tokenizer_config.json`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cfmerge.errors import CfmergeError
from cfmerge.formats import Source
from cfmerge.formats.layout import read_json

OWN, CONFIG = "chat_template.jinja", "tokenizer_config.json"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def template_of(source: Source) -> str | None:
    """A model's chat template; None: it has none."""
    if OWN in source.side_files:
        return source.side_files[OWN].read_text()
    content = read_json(source.side_files[CONFIG]) if CONFIG in source.side_files else {}
    found = content.get("chat_template")
    if isinstance(found, list):  # several, by their names
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
    return found if isinstance(found, str) else None


def with_template(
    asked: str, base: Source, experts: Sequence[Source], side_files: Mapping[str, Path]
) -> tuple[dict[str, Path], dict[str, dict[str, str]], list[str]]:
    """The output's side files, the keys that change in them, and notes.

    Args:
        asked: "auto", "chatml", or Jinja.
        side_files: the output's, with the base's template.

    Raises:
        CfmergeError: it is none of these, or there is no tokenizer that it could belong to.
    """
    notes = []
    if asked == "auto":
        found = Counter(template.strip() for one in (base, *experts) if (template := template_of(one)))
        if not found:
            return (
                dict(side_files),
                {},
                ["chat_template auto: no model has a chat template, and neither has the output"],
            )
        ((text, count),) = found.most_common(1)
        if len(found) > 1:
            notes.append(f"chat_template auto: {count} of {found.total()} models with one have the output's")
    elif asked == "chatml":
        text = CHATML
    elif "{" in asked:
        text = asked
    else:
        raise CfmergeError(
            f"chat_template {asked!r}: expected auto (that of most models), chatml, or the template itself, in Jinja"
        )
    if CONFIG not in side_files:
        raise CfmergeError(f"chat_template: the output has no {CONFIG}, and so no tokenizer; name one by side_files")
    return {name: path for name, path in side_files.items() if name != OWN}, {CONFIG: {"chat_template": text}}, notes
