"""Text of many scripts: alphabets, words of Unicode CLDR, and the typefaces that training draws.

    text = sample_text(rng, "cyrillic", 3, 20)      words.py
    face = sample_face(rng, "cyrillic", text)       faces.py

`alphabets.py` has the table of scripts and what makes a text ambiguous; `numbers.py` has dates,
prices and times; `tables.py` lists the Debian packages of the typefaces beyond those of fonts.py.
"""
