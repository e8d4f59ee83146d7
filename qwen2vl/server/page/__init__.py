"""The page of the server: HTML, style, scripts and vendored libraries, as package data.

`routes` serves them. The page is a client of the HTTP API like any other: it has no routes of its
own besides its files. js/main.js is where reading it begins; vendor/MANIFEST.json names what was
not written here.
"""
