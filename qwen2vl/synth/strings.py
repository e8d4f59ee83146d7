"""Sampling of strings for text images: random characters, and text made of words and numbers.

Half or more of all lines are random, so that a model cannot predict characters from language alone.
The alphabet includes eight punctuation characters: . , ! ? - : ' & and spaces occur only between
words.
"""

from __future__ import annotations

from random import Random

__all__ = ["ALPHABETS", "DIGITS", "LETTERS", "PUNCTUATION", "WORDS", "random_string", "word_string"]

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PUNCTUATION = ".,!?-:'&"
ALPHABETS = {"digits": DIGITS, "letters": LETTERS, "all": LETTERS + DIGITS + PUNCTUATION}

WORDS = tuple(
    (
        "about after again air all almost also always and animal answer apple around ask away "
        "back bad ball bank bear bed before begin best big bird black blue boat body book both "
        "box boy bread bring brother build bus but buy by cake call can car cat chair change "
        "child city clean close cloud coat coffee cold come cook corn count country cup cut "
        "dance dark day deep door down draw dream drink drive dry duck each ear early earth "
        "east easy eat egg eight empty end enough every eye face fall family far farm fast "
        "father feel few field fire first fish five floor flower fly food foot forest four free "
        "fresh friend from fruit full game garden gate girl give glass go gold good grass great "
        "green ground group grow hair half hand happy hard hat have head hear heart heavy hello "
        "help here high hill home honey horse hot hour house how ice idea into island job join "
        "juice jump just keep key kind king kitchen know lake land large last late laugh lead "
        "leaf learn leave left lemon letter life light like line lion list little live long "
        "look lost love low lunch make man many map market may meat meet milk mind minute moon "
        "more morning mother mountain mouse move much music name near never new next nice night "
        "nine noise north nose not note now number ocean off office often oil old once one only "
        "open orange other our out over page paint paper park part party pass past pay pen "
        "people piano picture piece place plan plant play please point pool poor press price "
        "pull push queen quick quiet rain read ready red rest rice rich ride right ring river "
        "road rock room round run sad safe sail salt same sand save school sea seat second see "
        "sell send seven shade shape ship shoe shop short show sing sister six sky sleep slow "
        "small smile snow soap soft some song soon south space speak spring square stand star "
        "start station stay step stone stop store story street strong sugar summer sun sweet "
        "swim table talk tall tea teach team tell ten thank their thing think three ticket "
        "tiger time today together top touch town train travel tree trip true turn two under "
        "until use valley very village visit voice wait walk wall want warm wash watch water "
        "way week well west what wheel when where white who why wide wild wind window winter "
        "wish with wolf wood word work world write year yellow yes young zero zoo "
    ).split()
)

# Without a neighbor these look like another character at another size or height.
_AMBIGUOUS_ALONE = frozenset("CcKkOoPpSsUuVvWwXxYyZz0Il1.,-:'")


def random_string(
    rng: Random, length: int, alphabet: str, *, spaces: bool, excluded: str = ""
) -> str:
    """Sample characters independently; some strings get one space, not at either end.

    A string of ambiguous characters gets one that shows the font size, since "o" and "O" could not
    be distinguished otherwise.
    """
    chars = [rng.choice(alphabet) for _ in range(length)]
    chars = [rng.choice("abdefgh") if c in excluded else c for c in chars]
    if _AMBIGUOUS_ALONE.issuperset(chars):
        anchors = [c for c in alphabet if c not in _AMBIGUOUS_ALONE]
        chars[rng.randrange(length)] = rng.choice(anchors)
    if spaces and length >= 5 and rng.random() < 0.4:
        chars[rng.randrange(2, length - 2)] = " "
    return "".join(chars)


def word_string(rng: Random, low: int, high: int, alphabet: str) -> str:
    """Sample words, numbers, times and prices of `low` to `high` characters, in several cases.

    Only the last word may be cut. For the digits alphabet, and for targets of one or two
    characters, the result is a random string.
    """
    target = rng.randint(low, high)
    if alphabet == DIGITS or target < 3:
        return random_string(rng, target, alphabet, spaces=False, excluded="I")
    marks = alphabet == ALPHABETS["all"]
    text = _sample_word(rng, marks=marks)
    while len(text) < target:
        text += _sample_separator(rng, marks=marks) + _sample_word(rng, marks=marks)
    case = rng.randrange(4)
    text = (text, text.capitalize(), text.upper(), text.title())[case]
    return text[:target].strip(" ")


def _sample_word(rng: Random, *, marks: bool) -> str:
    kind = rng.random()
    if not marks or kind < 0.8:
        return rng.choice(WORDS)
    if kind < 0.9:
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    if kind < 0.95:
        return f"{rng.randrange(24)}:{rng.randrange(60):02d}"
    return f"{rng.randrange(100)}.{rng.randrange(100):02d}"


def _sample_separator(rng: Random, *, marks: bool) -> str:
    if not marks or rng.random() < 0.75:
        return " "
    return rng.choice((", ", ". ", "! ", "? ", "-", ": ", " & ", "'"))
