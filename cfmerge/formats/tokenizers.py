"""Tokenizers as files beside the weights: their vocabulary read, and the output's kept in step with it.

Read are `tokenizer.json`; else `vocab.txt`, or `vocab.json` with `merges.txt`, and `added_tokens.json`. Written is what
names tokens: `tokenizer.json`, `added_tokens.json`, `tokenizer_config.json`, the configs' `vocab_size` and ids.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cfmerge.errors import CfmergeError
from cfmerge.formats.layout import read_json
from cfmerge.models.vocabulary import PLAIN, Vocabulary, of_parts, of_tokenizer

Files = Mapping[str, Path]
Edits = dict[str, dict[str, Any]]
FILES = re.compile(
    r"^(tokenizer\.json|tokenizer\.model|\w+\.(model|spm|bpe|tiktoken)|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(txt|json)|merges\.txt|chat_template\.(jinja|json)|additional_chat_templates/.*)$"
)
PIECES = re.compile(r"^(tokenizer|spiece|sentencepiece(\.bpe)?|source|target|vocab)\.(model|spm)$")
ADDED = ["added_tokens.json"]
CONFIGS = ("config.json", "generation_config.json")
ID = re.compile(r"(_token_id|_token_index|_ids?_for_generation)$|^(suppress_tokens|begin_suppress_tokens)$")
FAST = "save a fast tokenizer beside it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"


def same_tokenizer(ours: Files, theirs: Files) -> bool:
    """Whether two models' files give the same tokens, judged by their bytes: by the first form that both have."""
    pieces = [name for name in ours if PIECES.match(name)][:1]
    for form in (["tokenizer.json"], ["vocab.txt", *ADDED], ["vocab.json", "merges.txt", *ADDED], [*pieces, *ADDED]):
        if form[0] in ours and form[0] in theirs and form[0] not in ADDED:
            return all(_bytes(ours, name) == _bytes(theirs, name) for name in form)
    return False


def _bytes(files: Files, name: str) -> bytes | None:
    return files[name].read_bytes() if name in files else None


def has_tokenizer(files: Files) -> bool:
    """Whether a tokenizer's files lie beside a model."""
    return any(name in files for name in ("tokenizer.json", "vocab.txt", "vocab.json")) or any(map(PIECES.match, files))


def read_vocabulary(files: Files) -> Vocabulary | None:
    """The vocabulary of a model's tokenizer; None if there is none beside its weights.

    Raises:
        CfmergeError: its tokenizer is in a form whose tokens cannot be read, or its ids are not those of the model.
    """
    if "tokenizer.json" in files:
        return of_tokenizer(read_json(files["tokenizer.json"]), str(files["tokenizer.json"]))
    added = (
        {str(k): int(v) for k, v in read_json(files["added_tokens.json"]).items()}
        if "added_tokens.json" in files
        else {}
    )
    if "vocab.txt" in files:
        lines = files["vocab.txt"].read_text(encoding="utf-8").splitlines()
        return of_parts({line: n for n, line in enumerate(lines)}, added, (), str(files["vocab.txt"]))
    if "vocab.json" in files:
        own = {str(token): int(number) for token, number in read_json(files["vocab.json"]).items()}
        merges = files["merges.txt"].read_text(encoding="utf-8").splitlines() if "merges.txt" in files else ()
        return of_parts(own, added, merges, str(files["vocab.json"]))
    pieces = next((path for name, path in files.items() if PIECES.match(name)), None)
    if pieces is not None:
        raise CfmergeError(f"{pieces}: its tokens cannot be read without another library; {FAST}")
    return None


# --- what an output changes in the files that are copied --------------------------------------------------------------


def tokenizer_files(files: Files) -> Files:
    """The files that make up a tokenizer, among those beside a model."""
    return {name: path for name, path in files.items() if FILES.match(name)}


def token_edits(files: Files, before: Vocabulary, output: Vocabulary) -> Edits:
    """`{file: {key: value}}` that add the output's new tokens to the files of a tokenizer.

    Raises:
        CfmergeError: there is no `tokenizer.json` to add them to.
    """
    new = {token: number for token, number in output.ids.items() if token not in before.ids}
    if not new:
        return {}
    if "tokenizer.json" not in files:
        raise CfmergeError(
            f"vocabulary: the output's tokens are added to a tokenizer.json, and the base has none; {FAST}"
        )
    entries = [{"id": number, "content": token, **PLAIN, **output.added[token]} for token, number in new.items()]
    content = read_json(files["tokenizer.json"])
    edits: Edits = {"tokenizer.json": {"added_tokens": [*(content.get("added_tokens") or ()), *entries]}}
    if "added_tokens.json" in files:
        edits["added_tokens.json"] = dict(new)
    config = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    if isinstance(config.get("added_tokens_decoder"), dict):
        told = {str(entry["id"]): {key: entry[key] for key in ("content", *PLAIN)} for entry in entries}
        edits["tokenizer_config.json"] = {"added_tokens_decoder": config["added_tokens_decoder"] | told}
    return edits


def config_edits(files: Files, rows: tuple[int, int], number_of: Callable[[int], int]) -> Edits:
    """The same for configs: the number of rows, and the ids of tokens that they name.

    Args:
        rows: how many rows base and output have.
        number_of: the output's id for an id of the base.
    """
    edits: Edits = {}
    for name in (name for name in CONFIGS if name in files):
        content = read_json(files[name])
        changed = _changed(content, rows, number_of)
        own = {key: value for key, value in changed.items() if value != content[key]}
        if own:
            edits[name] = own
    return edits


def _changed(content: Mapping[str, Any], rows: tuple[int, int], number_of: Callable[[int], int]) -> dict[str, Any]:
    def value_of(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return _changed(value, rows, number_of)
        if key == "vocab_size" and value == rows[0]:
            return rows[1]
        if ID.search(key) and isinstance(value, list):
            return [number_of(one) if type(one) is int else one for one in value]
        return number_of(value) if ID.search(key) and type(value) is int else value

    return {key: value_of(key, value) for key, value in content.items()}
