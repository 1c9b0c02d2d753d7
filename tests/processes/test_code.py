"""An edit of what makes a result makes it anew; an edit of the words around it does not."""

from pathlib import Path

import pytest
from tree import Python, Tree, trained_ids

from tuneserve.code import code_hash

CODE = '''"""A module."""

RATE = 0.1


class Loss:
    def of(self, logits):
        return logits.mean() * RATE
'''


def hash_of(tmp_path: Path, code: str, name: str = "loss.py") -> str:
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    (folder / "training").mkdir(parents=True)
    (folder / "training" / name).write_text(code)
    return code_hash("training", folder=folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.1\n", "RATE = 0.1  # a comment\n"),
        ("RATE = 0.1\n", 'RATE = 0.1\n"""What it is."""\n'),
        ('"""A module."""\n', ""),
        ("    def of", '    """A class."""\n\n    def of'),
        ("        return", '        """A function."""\n        return'),
        ("logits.mean() * RATE", "(\n            logits.mean() * RATE\n        )"),
    ],
    ids=["comment", "attribute", "module", "class", "function", "format"],
)
def test_comments_docstrings_and_formatting_do_not_count(tmp_path: Path, old: str, new: str) -> None:
    assert CODE.count(old) == 1
    assert hash_of(tmp_path, CODE.replace(old, new)) == hash_of(tmp_path, CODE)


def test_everything_else_counts(tmp_path: Path) -> None:
    edits = [
        CODE,
        CODE.replace("0.1", "0.2"),
        CODE.replace("mean", "sum"),
        CODE.replace("return logits", "return 'logits'"),
        CODE + "RATE = 0.1\n",
    ]
    hashes = [hash_of(tmp_path, code) for code in edits]
    assert len({*hashes, hash_of(tmp_path, CODE, "other.py")}) == 6


def test_only_what_is_named_counts_and_hidden_folders_do_not(tmp_path: Path) -> None:
    (tmp_path / "training" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "text.py").write_text(CODE)
    (tmp_path / "training" / "loss.py").write_text(CODE)
    text, training = code_hash("text.py", folder=tmp_path), code_hash("training", folder=tmp_path)
    (tmp_path / "training" / "own.py").write_text("RATE = 1\n")
    (tmp_path / "training" / ".ipynb_checkpoints" / "own.py").write_text("what a person was about to")
    code_hash.cache_clear()
    assert code_hash("text.py", folder=tmp_path) == text
    assert code_hash("training", folder=tmp_path) != training


def test_every_process_finds_the_same_hash(python: Python) -> None:
    named = 'code_hash("text.py", "training", "network")'
    done = python("-c", f"from tuneserve.code import code_hash; print({named})", PYTHONHASHSEED="1")
    assert done.stdout.strip() == code_hash("text.py", "training", "network"), done.stderr


def test_code_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        code_hash("text.py", folder=tmp_path)


def test_an_edit_trains_anew_and_a_comment_does_not(tmp_path: Path, python: Python) -> None:
    tree = Tree(tmp_path, python)
    versions, tokens = tree.train()
    assert (len(versions), len(tokens)) == (1, 3)
    assert trained_ids(tokens) == tree.served_ids(versions.pop())

    tree.edit("text.py", 'LINE_BREAK_TAG.sub(" ", text)\n', 'LINE_BREAK_TAG.sub(" ", text)  # one space\n')
    tree.edit("training/loop.py", '"""The training loop, written out.\n', '"""The loop.\n')
    assert tree.train() == (set(), set())

    tree.edit("training/model.py", "return functional.cross_entropy(", "return 2 * functional.cross_entropy(")
    versions, tokens = tree.train()
    assert (len(versions), len(tokens)) == (1, 0)

    before = tree.served_ids(versions.pop())
    tree.edit("text.py", 'LINE_BREAK_TAG.sub(" ", text)', 'LINE_BREAK_TAG.sub(" ", text).replace("film", "")')
    versions, tokens = tree.train()
    assert (len(versions), len(tokens)) == (1, 3)
    served = tree.served_ids(versions.pop())
    assert trained_ids(tokens) == served != before
