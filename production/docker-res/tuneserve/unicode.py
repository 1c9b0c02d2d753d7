"""Whether a Python string is Unicode text."""


def has_surrogates(text: str) -> bool:
    """Whether it holds half a surrogate pair, which no encoding of Unicode can write.

    An escape in JSON can make one, and so can bytes of the environment that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
