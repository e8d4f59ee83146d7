"""Numbers as they are written: counts, prices, dates, times, telephone numbers, measures.

All are ASCII but for the signs of pound and euro, and most have the forms of several countries.
"""

from __future__ import annotations

from random import Random

__all__ = ["sample_number"]

_CENTS = (0, 5, 9, 20, 25, 40, 49, 50, 75, 80, 95, 99)
_UNITS = ("kg", "g", "km", "m", "cm", "mm", "l", "ml", "h", "min", "s", "W", "V", "MB", "GB")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def sample_number(rng: Random) -> str:
    """Sample a number of any kind, of 1 to some 20 characters."""
    return rng.choice((*_KINDS, _digits))(rng)


def _digits(rng: Random) -> str:
    """Sample one to three groups of random digits."""
    separator = rng.choice((" ", " ", "-", ".", "/", ""))
    groups = [
        "".join(rng.choices("0123456789", k=rng.randint(1, 6))) for _ in range(rng.randint(1, 3))
    ]
    return separator.join(groups)


def _count(rng: Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 7)))


def _grouped(rng: Random) -> str:
    return f"{rng.randrange(1000, 10 ** rng.randint(4, 9)):,}".replace(",", rng.choice(",,. "))


def _decimal(rng: Random) -> str:
    sign = rng.choice(("", "", "-", "+"))
    return f"{sign}{rng.randrange(10 ** rng.randint(1, 4))}{rng.choice('..,')}{_digit_run(rng)}"


def _digit_run(rng: Random) -> str:
    return "".join(rng.choices("0123456789", k=rng.randint(1, 3)))


def _price(rng: Random) -> str:
    whole = rng.randrange(10 ** rng.randint(1, 4))
    mark = rng.choice("..,")
    amount = f"{whole}{mark}{rng.choice(_CENTS):02d}" if rng.random() < 0.8 else str(whole)
    currency = rng.choice("$£€")
    return f"{currency}{amount}" if rng.random() < 0.7 else f"{amount} {currency}"


def _percent(rng: Random) -> str:
    number = str(rng.randrange(101)) if rng.random() < 0.7 else f"{rng.uniform(0, 100):.1f}"
    return f"{rng.choice(('', '', '-', '+'))}{number}%"


def _date(rng: Random) -> str:
    year, month, day = rng.randint(1900, 2050), rng.randint(1, 12), rng.randint(1, 31)
    mark = rng.choice("/.-")
    forms = (
        f"{year}-{month:02d}-{day:02d}",
        f"{day:02d}{mark}{month:02d}{mark}{year}",
        f"{day}{mark}{month}{mark}{year}",
        f"{month}/{day}/{year % 100:02d}",
        f"{day} {_MONTHS[month - 1]} {year}",
        f"{_MONTHS[month - 1]} {day}",
        str(year),
    )
    return rng.choice(forms)


def _time(rng: Random) -> str:
    hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    forms = (
        f"{hour}:{minute:02d}",
        f"{hour:02d}:{minute:02d}",
        f"{hour:02d}:{minute:02d}:{second:02d}",
        f"{hour % 12 + 1}:{minute:02d} {rng.choice(('am', 'pm', 'AM', 'PM'))}",
        f"{hour}:{minute:02d} - {rng.randrange(24)}:{second:02d}",
        f"{hour:02d}.{minute:02d}-{rng.randrange(24):02d}.{second:02d}",
    )
    return rng.choice(forms)


def _phone(rng: Random) -> str:
    sizes = rng.choice(((3, 4), (3, 3, 4), (2, 4, 4), (4, 6), (3, 2, 2, 2), (2, 2, 2, 2, 2)))
    groups = ["".join(rng.choices("0123456789", k=size)) for size in sizes]
    prefix = rng.choice(("", "", "0", f"+{rng.randint(1, 99)} "))
    return prefix + rng.choice(" --").join(groups)


def _measure(rng: Random) -> str:
    number = f"{rng.randrange(10 ** rng.randint(1, 3))}"
    if rng.random() < 0.3:
        number += f".{rng.randrange(10)}"
    return f"{number}{rng.choice((' ', ' ', ''))}{rng.choice(_UNITS)}"


def _fraction(rng: Random) -> str:
    a, b = rng.randrange(1, 100), rng.randrange(1, 100)
    return rng.choice((f"{a}/{b}", f"{a} x {b}", f"{a} + {b}", f"{a} - {b}", f"{a}:{b}", f"#{a}"))


_KINDS = (
    *(_count, _grouped, _decimal, _price, _price, _percent, _date, _date),
    *(_time, _time, _phone, _measure, _fraction),
)
